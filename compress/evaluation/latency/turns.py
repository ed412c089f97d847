"""Seconds of prefill and of a decoded token, both models side by side through their public loader.

Times of one machine wander by more than what is looked for. So both models are loaded, they take turns, and what is
judged is the ratio of neighbouring turns. What runs is transformers: it unpacks compressed-tensors weights in its first
forward, so this measures the model's shape (pruned blocks, narrower channels), and nothing of the packed kernels that
another runtime has.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats

from compress.evaluation.latency.spec import PARTS, Latency
from compress.evaluation.measure import Measured
from compress.evaluation.statistics import Interval


@dataclass(frozen=True)
class Turns:
    """Seconds of every turn of one model; `decode` is of one token. Each (repeats,)."""

    prefill: NDArray[np.float64]
    decode: NDArray[np.float64]


@torch.no_grad()
def take_turns(spec: Latency, source: Any, compressed: Any, vocabulary: int) -> tuple[Turns, Turns]:
    """Both models on the same prompt, by turns; the order changes every time."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (spec.batch, spec.prompt_tokens), generator=generator)
    models = (source, compressed)
    taken: tuple[list[tuple[float, float]], list[tuple[float, float]]] = ([], [])
    for turn in range(spec.repeats + 1):
        for which in (0, 1) if turn % 2 == 0 else (1, 0):
            taken[which].append(_turn(models[which], ids.to(models[which].device), spec.new_tokens))
    first, second = (np.array(rows[1:], dtype=np.float64) for rows in taken)
    return Turns(first[:, 0], first[:, 1]), Turns(second[:, 0], second[:, 1])


def _turn(model: Any, ids: torch.Tensor, new_tokens: int) -> tuple[float, float]:
    """Seconds of the prefill, and of a token after it."""
    _wait(model)
    started = time.perf_counter()
    output = model(ids, use_cache=True)
    step = output.logits[:, -1:].argmax(-1)
    _wait(model)
    read = time.perf_counter()
    for _ in range(new_tokens):
        output = model(step, past_key_values=output.past_key_values, use_cache=True)
        step = output.logits[:, -1:].argmax(-1)
    _wait(model)
    return read - started, (time.perf_counter() - read) / new_tokens


def _wait(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


def measure(turns: tuple[Turns, Turns], source: Measured, compressed: Measured) -> None:
    """Medians and intervals of both sides, and of the ratio turn by turn."""
    for part in PARTS:
        name = f"latency.{part}_seconds"
        seconds = [getattr(side, part) for side in turns]
        for measured, values in zip((source, compressed), seconds, strict=True):
            measured.values[name] = float(np.median(values))
            measured.intervals[name] = _interval(values)
        compressed.ratio_intervals[name] = _interval(seconds[1] / seconds[0])


def _interval(values: NDArray[np.float64], confidence: float = 0.95) -> Interval:
    """Of the typical value: Student's t on logarithms, which suit times."""
    logs = np.log(values)
    reach = float(stats.t.ppf(0.5 + confidence / 2, len(logs) - 1)) * float(logs.std(ddof=1)) / math.sqrt(len(logs))
    mean = float(logs.mean())
    return math.exp(mean - reach), math.exp(mean + reach)
