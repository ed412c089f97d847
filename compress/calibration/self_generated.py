"""Calibration text sampled from the model itself: for when no data may be used, and beside text that is too uniform.

Each document starts from the start token (or, where a model has none, from a random common token), and is sampled with
the model's own probabilities; that is the data the model was made to predict (see LLM-QAT, arXiv 2305.17888). The
whole model is loaded for this, so it needs the memory of the model. On CPUs with units for it the model computes in
bfloat16: which likely text is drawn does not matter.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from compress.calibration.draws import tokens_drawn
from compress.calibration.products import has_units_for_bfloat16
from compress.calibration.texts import Descriptor, SelfGenerated
from compress.calibration.window_specs import WindowSpec
from compress.calibration.windows import Windows, assemble
from compress.checkpoints.reader import Checkpoint
from compress.events import Progress


def sample_windows(
    spec: WindowSpec, checkpoint: Checkpoint, tokenizer: Any, seed: int, device: torch.device, progress: Progress
) -> Windows:
    """`spec.windows` windows sampled from the model in `checkpoint`."""
    from transformers import AutoModelForCausalLM

    assert isinstance(spec.data, SelfGenerated) or spec.data == "self-generated"
    source = spec.data if isinstance(spec.data, SelfGenerated) else SelfGenerated()
    model = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=_dtype(device)).to(device).eval()
    generator = torch.Generator(device=device).manual_seed(seed)
    length = min(source.document_tokens or spec.window_tokens, spec.window_tokens)
    each = math.ceil(spec.window_tokens / length)
    at_once = source.batch_windows * each
    rows = []
    starts = range(0, spec.windows * each, at_once)
    with progress.task("calibration text from the model", length * len(starts)) as advance:
        for start in starts:
            count = min(at_once, spec.windows * each - start)
            first = _first_tokens(count, tokenizer, model.config.vocab_size, generator, device)
            rows.append(_sample(model, first, length, source.temperature, generator, advance))
    descriptor = Descriptor(name="self-generated", source=source, licence="that of the model")
    ids = torch.cat(rows).cpu().view(spec.windows, each * length)[:, : spec.window_tokens].contiguous()
    return assemble(ids, None, spec, descriptor, {"documents": spec.windows * each}, "calibration")


def _dtype(device: torch.device) -> torch.dtype | str:
    if device.type != "cpu":
        return "auto"
    return torch.bfloat16 if has_units_for_bfloat16() else torch.float32


def _first_tokens(
    count: int, tokenizer: Any, vocabulary: int, generator: torch.Generator, device: torch.device
) -> torch.Tensor:
    bos = getattr(tokenizer, "bos_token_id", None)
    if bos is not None:
        return torch.full((count, 1), int(bos), device=device)
    # Low ids are single characters and frequent words in every BPE vocabulary.
    return torch.randint(0, min(1000, vocabulary), (count, 1), generator=generator, device=device)


@torch.no_grad()
def _sample(
    model: Any, ids: torch.Tensor, length: int, temperature: float, generator: torch.Generator, advance: Any
) -> torch.Tensor:
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    step = ids
    while ids.shape[1] < length:
        logits = model(step, past_key_values=cache, use_cache=True).logits[:, -1].float()
        step = tokens_drawn(torch.softmax(logits / temperature, -1), generator)
        ids = torch.cat([ids, step], dim=1)
        advance("")
    return ids
