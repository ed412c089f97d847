"""The export through its public loader, against our own reading of the same files.

`AutoModelForCausalLM.from_pretrained` with the compressed-tensors package, nothing of ours. What it computes must be
what was measured: both read the same windows, and the divergence between them is bounded. Also measured here, because
a loaded model is needed: resident weight bytes and the bytes of a real KV cache.
"""

from __future__ import annotations

import gc
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.calibration.windows import Windows
from compress.checkpoints.formats.bitsandbytes import without_cpu_kernel
from compress.checkpoints.reader import Checkpoint
from compress.checkpoints.skeleton import Head, Skeleton
from compress.steps.environment import Machine

BOUND = 1e-4
"""Largest mean KL (nats) between loader and our reading that counts as rounding; docs/adr/0006-round-trip.md has what
wrong readings measure (a zero point off by one in a single linear: 9e-3)."""
BOUND_OF_STEPS = 1e-3
"""The same where what differs in the last bit of float32 moves inputs by whole steps of int8: for LLM.int8, which
rounds them to float16 first (1.2e-4 seen), and for W8A8 on a GPU, where loader and walk sum in another order (2.3e-4
seen; on a CPU they sum alike, and 1e-4 holds)."""
PROMPT_TOKENS = 32
COMPARED_WINDOWS = 4
COMPARED_TOKENS = 256
"""Tokens of each compared window; attention is causal, so a prefix is computed as in the whole window."""


@dataclass(frozen=True)
class Reloaded:
    """What the public loader gave."""

    loader: str
    tokens: int
    max_abs_logit_difference: float
    mean_kl: float
    resident_bytes: int
    kv_cache_bytes_per_prompt: int
    """Bytes of the KV cache of one sequence of `prompt_tokens` tokens, `kv_dtype_bytes` an element."""
    kv_dtype_bytes: int
    prompt_tokens: int
    bound: float = BOUND
    """Largest mean KL that is accepted as rounding."""


def reload(folder: Path, checkpoint: Checkpoint, windows: Windows, states: Tensor, machine: Machine) -> Reloaded:
    """Load `folder` publicly and compare logits on the first windows.

    checkpoint: the same weights as we read them. states (windows, tokens, hidden): their final hidden states on
    `windows`, computed in float32.
    Both sides compute in float32, so that what differs is the reading and not the arithmetic.
    """
    from transformers import AutoModelForCausalLM

    with _silence():
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").to(machine.device).eval()
    plainly = without_cpu_kernel(model)
    resident = _bytes(model)
    with torch.no_grad():
        # The first forward unpacks the weights, in their stored dtype; only then may the model become float32.
        prompt = windows.ids[:1, :PROMPT_TOKENS].to(machine.device)
        with _silence():
            cache = model(prompt, use_cache=True).past_key_values
        kv_bytes, kv_dtype = _cache_bytes(cache)
        # transformers forbids .float() on a quantised model, but the weights are plain tensors by now.
        torch.nn.Module.float(model)
    skeleton = Skeleton(checkpoint.config, machine.device, torch.float32)
    worst, total, count = 0.0, 0.0, 0
    with skeleton.head(checkpoint) as head:
        for row in range(min(COMPARED_WINDOWS, len(windows.ids))):
            ours, theirs = _logits(model, head, windows, states, row, machine)
            largest = float((ours - theirs).abs().max())
            worst = largest if math.isnan(largest) or largest > worst else worst
            log_p, log_q = ours.log_softmax(-1), theirs.log_softmax(-1)
            total += float((log_p.exp() * (log_p - log_q)).sum(dtype=torch.float64))
            count += ours.shape[0]
    name = f"transformers AutoModelForCausalLM ({type(model).__name__})"
    name += ", bitsandbytes' bfloat16 kernel for this CPU left off" if plainly else ""
    tokens = prompt.shape[1]
    del model, cache
    gc.collect()
    mean = total / count if math.isnan(total) else max(0.0, total / count)
    return Reloaded(name, count, worst, mean, resident, kv_bytes, kv_dtype, tokens)


@contextmanager
def _silence() -> Iterator[None]:
    """The loader draws its own progress bars on stderr, whatever it is told."""
    with warnings.catch_warnings(), redirect_stderr(StringIO()):
        warnings.simplefilter("ignore")
        yield


@torch.no_grad()
def _logits(
    model: Any, head: Head, windows: Windows, states: Tensor, row: int, machine: Machine
) -> tuple[Tensor, Tensor]:
    """Our logits and the loader's for the first tokens of one window, without padding: float32 (tokens, vocabulary)."""
    ids = windows.ids[row : row + 1, :COMPARED_TOKENS].to(machine.device)
    mask = None if windows.mask is None else windows.mask[row : row + 1, :COMPARED_TOKENS].to(machine.device)
    theirs = model(ids, attention_mask=mask, use_cache=False).logits[0].float()
    ours = head.logits(states[row, :COMPARED_TOKENS].to(machine.device))
    keep = slice(None) if mask is None else mask[0].bool()
    return ours[keep], theirs[keep]


def _bytes(model: Any) -> int:
    """Bytes of parameters and buffers, tied ones once."""
    seen = {}
    for tensor in (*model.parameters(), *model.buffers()):
        seen[tensor.data_ptr() or id(tensor)] = tensor.numel() * tensor.element_size()
    return sum(seen.values())


def _cache_bytes(cache: Any) -> tuple[int, int]:
    """(bytes of keys and values, bytes per element) of a transformers cache."""
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors), tensors[0].element_size()
