"""What each group of linears costs alone: the divergence with a candidate in its place and the source everywhere else.

Second-order costs (`calibration.fisher`) take outputs and tokens as independent of each other, and errors as they are
on the text that was solved with. They are off by a factor of each group's own for that: on SmolLM2-135M most are 1.4
times too low, some five times. The factor is taken not to depend on the candidate, so one is measured, on a few tokens
that nothing was solved with.

A model that differs from the source in block b only is the source up to there. So the source walks once, at each block
a copy of its states goes through each of that block's changed linears, and all copies go on through further blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from compress.allocation.units import Unit
from compress.calibration.walk import forward_of
from compress.calibration.windows import Windows
from compress.checkpoints.candidates import Assigned
from compress.checkpoints.skeleton import Head, Skeleton
from compress.memory.measure import trim
from compress.quantization.scheme import Option
from compress.stages.base import StageContext

WINDOW = 256
"""Tokens of a window: more and shorter ones tell of more text."""
KEPT_BYTES = 256 * 2**20
"""Of copies of the hidden states that walk together."""
DRAWS = 512
"""Next tokens that are drawn for each position to compare two models by, in place of all logits."""
POSITIONS_AT_ONCE = 32
TRUSTED = 8.0
"""What a cost is scaled by at most, up or down: beyond that, so few tokens are taken for an accident."""


@dataclass(frozen=True)
class Tried:
    """A unit in its candidate `number`, everything else as it is."""

    unit: Unit
    number: int


def few_tokens(windows: Windows, tokens: int) -> Windows:
    """About so many tokens from the beginnings of windows."""
    width = min(WINDOW, windows.ids.shape[1])
    return windows.first(max(1, tokens // width)).shortened(width)


def factor(measured: float, predicted: float) -> float:
    """What a unit's predicted costs are multiplied by."""
    if not (measured > 0 and predicted > 0):
        return 1.0
    return min(TRUSTED, max(1 / TRUSTED, measured / predicted))


def held_back(measured: float, predicted: float) -> bool:
    """Whether `factor` is another than what was measured asks for; where nothing is predicted it asks for nothing."""
    return predicted > 0 and measured / predicted != factor(measured, predicted)


@torch.no_grad()
def divergences_alone(
    context: StageContext,
    kept: Path,
    schemes: Mapping[str, list[Option]],
    tried: Sequence[Tried],
    windows: Windows,
    advance: Callable[[str], None],
) -> Iterator[dict[str, float]]:
    """Mean KL (nats a token) by the name of the unit, some units at a time; `kept` is the folder with candidates.

    Calls `advance` once a unit.
    """
    skeleton = Skeleton(context.source.config, context.device, context.compute)
    hidden = int(skeleton.config.hidden_size)
    copies = max(1, KEPT_BYTES // (windows.ids.numel() * hidden * context.compute.itemsize))
    ordered = sorted(tried, key=lambda each: each.unit.block or 0)
    for start in range(0, len(ordered), copies):
        part = ordered[start : start + copies]
        yield _together(context, skeleton, kept, schemes, part, windows)
        for each in part:
            advance(each.unit.name)


def _together(
    context: StageContext,
    skeleton: Skeleton,
    kept: Path,
    schemes: Mapping[str, list[Option]],
    tried: Sequence[Tried],
    windows: Windows,
) -> dict[str, float]:
    source = context.source
    batches = windows.batches(context.tokens_at_once)
    states = skeleton.embed(source, batches)
    copies: dict[str, list[Tensor]] = {}
    for index in range(skeleton.block_count):
        forward = forward_of(skeleton, batches, index)
        name, entering = skeleton.architecture.block_name(index), states
        with skeleton.loaded(source, name) as block:
            states = [forward(block, number, each) for number, each in enumerate(entering)]
            for label, copy in copies.items():
                copies[label] = [forward(block, number, each) for number, each in enumerate(copy)]
        for here in (each for each in tried if each.unit.block == index):
            chosen = Assigned(source.folder, schemes, dict.fromkeys(here.unit.modules, here.number), kept)
            with skeleton.loaded(chosen, name) as block:
                copies[here.unit.name] = [forward(block, number, each) for number, each in enumerate(entering)]
        trim()
    with skeleton.head(source) as head:
        counted = [_counted(batch.ids, batch.mask) for batch in batches]
        wanted = _normed(head, states, counted)
        found = {label: _normed(head, copy, counted) for label, copy in copies.items()}
        return _divergences(head, wanted, found, context.seed)


def _counted(ids: Tensor, mask: Tensor | None) -> Tensor:
    """(windows, tokens) bool: positions whose next token is real, as evaluations count them."""
    counts = torch.ones_like(ids, dtype=torch.bool)
    if mask is not None:
        counts[:, :-1] = mask[:, 1:] != 0
    counts[:, -1] = False
    return counts


def _normed(head: Head, states: Sequence[Tensor], counted: Sequence[Tensor]) -> Tensor:
    """Final states (counted tokens, hidden), after the norm."""
    rows = [head.norm(each)[counts.to(each.device)] for each, counts in zip(states, counted, strict=True)]
    return torch.cat(rows)


def _divergences(head: Head, wanted: Tensor, found: Mapping[str, Tensor], seed: int) -> dict[str, float]:
    """Mean KL of each from `wanted` (tokens, hidden), from DRAWS next tokens a position that are drawn from p:

    KL(p || q) = log E_p[e^d] - E_p[d],    d = log q - log p, up to a constant that cancels

    Nothing but the drawn tokens' logits is formed for each of `found`. A position is off by sqrt(2 / DRAWS) of its
    divergence, a mean over a thousand of them by a five-hundredth.
    """
    generator = torch.Generator(device=wanted.device).manual_seed(seed)
    labels = list(found)
    totals = torch.zeros(len(labels), dtype=torch.float64, device=wanted.device)
    for start in range(0, len(wanted), POSITIONS_AT_ONCE):
        part = slice(start, start + POSITIONS_AT_ONCE)
        drawn = torch.multinomial(head.logits(wanted[part]).softmax(-1), DRAWS, True, generator=generator)
        after = torch.stack([found[label][part] for label in labels], -1)
        change = head.logits_of(drawn, after) - head.logits_of(drawn, wanted[part].unsqueeze(-1))
        divergence = change.logsumexp(1) - math.log(DRAWS) - change.mean(1)
        totals += divergence.sum(0, dtype=torch.float64)
    means = (totals / max(1, len(wanted))).tolist()
    return dict(zip(labels, means, strict=True))
