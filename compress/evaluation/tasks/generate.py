"""Greedy text through the public loader, in batches padded on the left.

The whole model is loaded, dequantised to the compute dtype, as the round trip does; whether it fits is for the caller
to know. Sampling settings that a model's own generation_config.json brings (temperature, repetition penalties) are left
out on both sides: what is compared is the likeliest text.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.checkpoints.formats.bitsandbytes import without_cpu_kernel
from compress.events import Progress


@dataclass(frozen=True)
class Generation:
    """One text to write: the prompt's token ids, strings that end the text, and the most tokens."""

    prompt: tuple[int, ...]
    stop: tuple[str, ...]
    max_new_tokens: int


@torch.no_grad()
def write_texts(
    folder: Path,
    tokenizer: Any,
    requests: Sequence[Generation],
    device: torch.device,
    dtype: torch.dtype,
    tokens_at_once: int,
    progress: Progress,
    label: str,
) -> list[str]:
    """The greedy text of every request, cut before its first stop string."""
    model = load_model(folder, device, dtype)
    order = sorted(
        range(len(requests)),
        key=lambda index: (requests[index].max_new_tokens, requests[index].stop, -len(requests[index].prompt)),
    )
    texts: dict[int, str] = {}
    with progress.task(label, len(requests)) as advance:
        start = 0
        while start < len(order):
            batch = _alike(order[start:], requests, tokens_at_once)
            written = _write(model, tokenizer, [requests[index] for index in batch])
            texts.update(zip(batch, written, strict=True))
            start += len(batch)
            for _ in batch:
                advance("")
    del model
    gc.collect()
    return [texts[index] for index in range(len(requests))]


def load_model(folder: Path, device: torch.device, dtype: torch.dtype, as_served: bool = False) -> Any:
    """The model in `dtype`. A quantised one unpacks in its first forward; only then may its dtype change. `as_served`:
    with the arithmetic of its loader's own kernels, where they run at all."""
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings(), redirect_stderr(StringIO()):
        warnings.simplefilter("ignore")
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").to(device).eval()
        without_cpu_kernel(model, where_it_stops=as_served)
        model(torch.ones(1, 2, dtype=torch.int64, device=device), use_cache=False)
    torch.nn.Module.to(model, dtype)
    return model


def _alike(order: list[int], requests: Sequence[Generation], tokens_at_once: int) -> list[int]:
    """The longest beginning of `order` with the same settings that makes one batch."""
    first = requests[order[0]]
    width = len(first.prompt) + first.max_new_tokens
    most = max(1, tokens_at_once // width)
    alike = [
        index
        for index in order[:most]
        if (requests[index].stop, requests[index].max_new_tokens) == (first.stop, first.max_new_tokens)
    ]
    return alike


def _write(model: Any, tokenizer: Any, batch: list[Generation]) -> list[str]:
    """Greedy texts of one batch with like settings."""
    width = max(len(one.prompt) for one in batch)
    ids = torch.zeros(len(batch), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, one in enumerate(batch):
        ids[row, width - len(one.prompt) :] = torch.tensor(one.prompt)
        mask[row, width - len(one.prompt) :] = 1
    ends = _ends(model, tokenizer)
    new = _greedy(model, tokenizer, ids.to(model.device), mask.to(model.device), ends, batch[0])
    return [_cut(tokenizer.decode(_until(row, ends), skip_special_tokens=True), batch[0].stop) for row in new.tolist()]


def _greedy(model: Any, tokenizer: Any, ids: Tensor, mask: Tensor, ends: set[int], settings: Generation) -> Tensor:
    """New token ids (rows, steps): the likeliest token each time, until every row has ended."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    new = ids.new_empty(len(ids), 0)
    step = ids
    for _ in range(settings.max_new_tokens):
        positions = (mask.cumsum(1) - 1).clamp_min(0)[:, -step.shape[1] :]
        logits = model(step, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True).logits[
            :, -1
        ]
        step = logits.float().argmax(-1, keepdim=True)
        new = torch.cat([new, step], 1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        if all(_ended(tokenizer, row, ends, settings.stop) for row in new.tolist()):
            break
    return new


def _ended(tokenizer: Any, row: list[int], ends: set[int], stop: tuple[str, ...]) -> bool:
    if not ends.isdisjoint(row):
        return True
    return bool(stop) and any(text in tokenizer.decode(row, skip_special_tokens=True) for text in stop)


def _ends(model: Any, tokenizer: Any) -> set[int]:
    """Token ids that end a text, those of the model's generation config included."""
    ends = {tokenizer.eos_token_id}
    declared = getattr(model.generation_config, "eos_token_id", None)
    ends |= set(declared) if isinstance(declared, (list, tuple)) else {declared}
    return {int(end) for end in ends if end is not None}


def _until(row: list[int], ends: set[int]) -> list[int]:
    at = next((position for position, token in enumerate(row) if token in ends), len(row))
    return row[:at]


def _cut(text: str, stop: tuple[str, ...]) -> str:
    """The text before the first stop string."""
    return text[: min((text.find(end) for end in stop if end in text), default=len(text))]
