"""Which blocks a model can do without: taken out one by one, each time the one whose loss the output shows least.

What a removal does is measured: mean KL of the source's next-token probabilities to those of the model without the
block, on tuning windows. Block influence (1 - cosine of a block's input and output, ShortGPT, arXiv 2403.03853) of the
model as it then is decides only which few blocks are tried. Those passed over are tried again after every removal.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.calibration.walk import forward_of
from compress.calibration.windows import Windows
from compress.checkpoints.skeleton import Skeleton
from compress.evaluation.measure import score
from compress.events import Quiet
from compress.files import write_json
from compress.stages.base import StageContext

TRIED = 8
"""Blocks whose removal is measured each time: those of the least influence."""


@dataclass(frozen=True)
class Removal:
    """One block less: its number in the source, its influence then, and the mean KL in nats without it."""

    block: int
    influence: float
    kl: float
    tried: int


class DepthSearch:
    """The search, on `windows`. Each removal is kept in `kept`, a JSON file, for a run that is killed later."""

    def __init__(self, context: StageContext, windows: Windows, kept: Path) -> None:
        self.context, self.windows, self.kept = context, windows, kept
        self.skeleton = Skeleton(context.source.config, context.device, context.compute)
        self.batches = windows.batches(context.tokens_at_once)
        self.architecture = self.skeleton.architecture

    @torch.no_grad()
    def removed(self, count: int, advance: Callable[[str], None]) -> list[Removal]:
        """The first `count` blocks to go, in order; `advance` is called once a block."""
        found = [Removal(**each) for each in json.loads(self.kept.read_text())] if self.kept.is_file() else []
        blocks = [index for index in range(self.skeleton.block_count) if index not in {each.block for each in found}]
        embedded = self.skeleton.embed(self.context.source, self.batches)
        wanted: Tensor | None = None
        for _ in found:
            advance("known from before")
        while len(found) < count:
            if wanted is None:
                wanted = self._finals(embedded, [*range(self.skeleton.block_count)])
            influence = self._influence(embedded, blocks)
            order = sorted(range(len(blocks)), key=lambda at: (influence[at], at))
            kls = self._without(embedded, blocks, sorted(order[:TRIED]), wanted)
            best = min(kls, key=lambda at: (kls[at], at))
            found.append(Removal(blocks.pop(best), influence[best], kls[best], len(kls)))
            self.kept.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.kept, [vars(each) for each in found])
            advance(f"without block {found[-1].block}: KL {found[-1].kl:.4g}")
        return found

    def _influence(self, embedded: list[Tensor], blocks: list[int]) -> list[float]:
        """1 - cosine between what enters and what leaves each block of the chain, mean over tokens."""
        states, values = list(embedded), []
        for index in blocks:
            total, tokens = 0.0, 0
            forward = forward_of(self.skeleton, self.batches, index)
            with self.skeleton.loaded(self.context.source, self.architecture.block_name(index)) as block:
                for number, hidden in enumerate(states):
                    states[number] = forward(block, number, hidden)
                    cosine = torch.cosine_similarity(hidden.float(), states[number].float(), dim=-1)
                    mask = self.batches[number].mask
                    real = cosine.flatten() if mask is None else cosine[mask.bool().to(cosine.device)]
                    total, tokens = total + float((1 - real).double().sum()), tokens + real.numel()
            values.append(total / max(1, tokens))
        return values

    def _without(self, embedded: list[Tensor], blocks: list[int], tried: list[int], wanted: Tensor) -> dict[int, float]:
        """Mean KL of the chain without one block, by its place in the chain. The blocks are walked once: a chain that
        lacks a block starts after it, with the states that came to it."""
        main = list(embedded)
        running: dict[int, list[Tensor]] = {}
        for at, index in enumerate(blocks):
            forward = forward_of(self.skeleton, self.batches, index)
            with self.skeleton.loaded(self.context.source, self.architecture.block_name(index)) as block:
                for states in running.values():
                    for number, hidden in enumerate(states):
                        states[number] = forward(block, number, hidden)
                if at in tried:
                    running[at] = list(main)
                if len(running) < len(tried):
                    main = [forward(block, number, hidden) for number, hidden in enumerate(main)]
        return {at: self._kl(wanted, self._normed(states)) for at, states in running.items()}

    def _finals(self, embedded: list[Tensor], blocks: list[int]) -> Tensor:
        states = list(embedded)
        for index in blocks:
            forward = forward_of(self.skeleton, self.batches, index)
            with self.skeleton.loaded(self.context.source, self.architecture.block_name(index)) as block:
                states = [forward(block, number, hidden) for number, hidden in enumerate(states)]
        return self._normed(states)

    def _normed(self, states: list[Tensor]) -> Tensor:
        """Final hidden states (windows, tokens, hidden) after the norm, on the CPU."""
        with self.skeleton.loaded(self.context.source, self.architecture.final_norm) as norm:
            return torch.cat([norm(hidden).float().cpu() for hidden in states])

    def _kl(self, wanted: Tensor, got: Tensor) -> float:
        source, context = self.context.source, self.context
        sets = {"tuning": self.windows}
        pairs = (source, {"tuning": wanted}), (source, {"tuning": got})
        scores = score(*pairs, sets, context.device, context.compute, Quiet())["tuning"]
        return float(scores.divergence[scores.counts].double().mean())


def facts_of(removals: list[Removal]) -> list[dict[str, Any]]:
    """For the report."""
    return [vars(each) for each in removals]
