"""Calibration text sampled from the model itself, for when no data may be used.

Each window starts from the start token (or, where a model has none, from a random common token), and is sampled with
the model's own probabilities; that is the data the model was made to predict (see LLM-QAT, arXiv 2305.17888). The
whole model is loaded for this, so it needs the memory of the model.
"""

from __future__ import annotations

from typing import Any

import torch

from compress.calibration.texts import Descriptor, SelfGenerated
from compress.calibration.windows import Windows, WindowSpec, assemble
from compress.checkpoints.reader import Checkpoint
from compress.events import Progress


def sample_windows(
    spec: WindowSpec, checkpoint: Checkpoint, tokenizer: Any, seed: int, device: torch.device, progress: Progress
) -> Windows:
    """`spec.windows` windows sampled from the model in `checkpoint`."""
    from transformers import AutoModelForCausalLM

    assert isinstance(spec.data, SelfGenerated) or spec.data == "self-generated"
    source = spec.data if isinstance(spec.data, SelfGenerated) else SelfGenerated()
    dtype = torch.float32 if device.type == "cpu" else "auto"
    model = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=dtype).to(device).eval()
    generator = torch.Generator(device=device).manual_seed(seed)
    rows = []
    starts = range(0, spec.windows, source.batch_windows)
    with progress.task("calibration text from the model", spec.window_tokens * len(starts)) as advance:
        for start in starts:
            count = min(source.batch_windows, spec.windows - start)
            first = _first_tokens(count, tokenizer, model.config.vocab_size, generator, device)
            rows.append(_sample(model, first, spec.window_tokens, source.temperature, generator, advance))
    descriptor = Descriptor(name="self-generated", source=source, licence="that of the model")
    return assemble(torch.cat(rows).cpu(), None, spec, descriptor, {"documents": spec.windows}, "calibration")


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
        step = torch.multinomial(torch.softmax(logits / temperature, -1), 1, generator=generator)
        ids = torch.cat([ids, step], dim=1)
        advance("")
    return ids
