"""Choices of one candidate for every unit: their bytes, their predicted cost, and their divergence as measured."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.allocation.budget import Sizes
from compress.allocation.fit import Fit, by_kind, fit
from compress.architecture import dimensions_of
from compress.checkpoints.candidates import Assigned
from compress.checkpoints.reader import Checkpoint
from compress.checkpoints.skeleton import Skeleton
from compress.checkpoints.working import WorkingCheckpoint
from compress.errors import RecipeError, UnhealthySourceError
from compress.evaluation.measure import States, score, walk_states
from compress.events import Quiet
from compress.files import digest_of_json, write_json
from compress.quantization.scheme import Scheme
from compress.stages.base import StageContext
from compress.stages.candidates import CandidateStage

WORTH_FITTING = 1.0
"""Nats above which a divergence says nothing about small ones."""
Choice = tuple[int, ...]
"""The number of the candidate of each unit."""


@dataclass(frozen=True)
class Judged:
    """Of a choice on the tuning windows, a token: mean KL to the source, and by how much the loss rose (nats)."""

    kl: float
    lost: float


class Choices:
    """What `sensitivity` left in a folder, put together and measured. Measurements are kept in `kept`, a JSON file."""

    def __init__(self, stage: CandidateStage, context: StageContext, kept: Path) -> None:
        assert context.windows is not None, "the pipeline gives calibration windows to stages that need them"
        self._context, self._kept, self.source = context, kept, context.source
        _, self.tuning = stage.split(context.windows)
        skeleton = Skeleton(self.source.config, context.device, context.compute)
        self.blocks = skeleton.block_count
        matrices = skeleton.linear_shapes()
        self.units = stage.units(skeleton.architecture, matrices)
        self.sizes = Sizes.of(
            skeleton.parameter_shapes(),
            {module: matrices[module] for unit in self.units for module in unit.modules},
            dimensions_of(skeleton.config),
            context.stored.itemsize,
            context.origin.weight_bytes,
            stage.format,
            {name: scheme for name, scheme in self.source.schemes.items() if name not in matrices},
        )
        found = candidates_in(self.source.folder, self.blocks)
        self.numbers = range(len(stage.candidates))
        self.schemes = {module: [Scheme.from_json(each["scheme"]) for each in rows] for module, rows in found.items()}
        self.costs = self._summed(found, "cost")
        self.bytes = self._summed(found, "bytes")
        self._known: dict[str, list[float]] = json.loads(kept.read_text()) if kept.is_file() else {}
        self._states: States | None = None

    def _summed(self, found: dict[str, list[dict[str, Any]]], what: str) -> list[list[Any]]:
        return [[sum(found[module][k][what] for module in unit.modules) for k in self.numbers] for unit in self.units]

    @property
    def measured(self) -> int:
        """Choices measured so far, kept ones included."""
        return len(self._known)

    def uniform(self, number: int) -> Choice:
        return (number,) * len(self.units)

    def size(self, choice: Choice) -> int:
        """Bytes of the linears."""
        return sum(int(row[k]) for row, k in zip(self.bytes, choice, strict=True))

    def effective_bits(self, choice: Choice) -> float:
        return 8 * self.size(choice) / self.sizes.weights

    def label(self, number: int) -> str:
        """A candidate in words, as the first unit has it."""
        return self.schemes[self.units[0].modules[0]][number].label

    def by_module(self, choice: Choice) -> dict[str, int]:
        return {module: k for unit, k in zip(self.units, choice, strict=True) for module in unit.modules}

    def judge(self, choice: Choice) -> Judged:
        """Measure a choice on the tuning windows; one that was measured before a kill is known."""
        key = digest_of_json(list(choice))
        if key not in self._known:
            context, sets = self._context, {"tuning": self.tuning}
            if self._states is None:
                self._states = self._walk(self.source)
            assigned = Assigned(self.source.folder, self.schemes, self.by_module(choice))
            pairs = (self.source, self._states), (assigned, self._walk(assigned))
            scores = score(*pairs, sets, context.device, context.compute, Quiet())["tuning"]
            values = [scores.divergence, scores.loss - scores.source_loss]
            self._known[key] = [float(value[scores.counts].double().mean()) for value in values]
            if not all(map(math.isfinite, self._known[key])):
                raise UnhealthySourceError(
                    "mixed_precision: linears at some candidates gave a divergence that is no finite number; leave out "
                    "the candidates with the fewest bits"
                )
            self._kept.parent.mkdir(parents=True, exist_ok=True)
            write_json(self._kept, self._known)
        return Judged(*self._known[key])

    def _walk(self, checkpoint: Checkpoint) -> States:
        context, sets = self._context, {"tuning": self.tuning}
        return walk_states(checkpoint, sets, context.device, context.compute, context.tokens_at_once, Quiet(), "")

    def fit(self, choices: Sequence[Choice]) -> Fit:
        """Factors from those choices whose divergence is small enough to say something."""
        kinds = [unit.kind for unit in self.units]
        judged = [(choice, self.judge(choice).kl) for choice in choices]
        used = [(choice, kl) for choice, kl in judged if 0 < kl <= WORTH_FITTING] or [
            min(judged, key=lambda each: each[1])
        ]
        rows = [by_kind(kinds, [row[k] for row, k in zip(self.costs, choice, strict=True)]) for choice, _ in used]
        return fit(rows, [max(kl, 1e-12) for _, kl in used])

    def fitted_costs(self, found: Fit) -> list[list[float]]:
        return [
            [found.factors[unit.kind] * cost for cost in row] for unit, row in zip(self.units, self.costs, strict=True)
        ]


def candidates_in(folder: Path, blocks: int) -> dict[str, list[dict[str, Any]]]:
    """What `sensitivity` recorded of every linear: scheme, cost in nats a token, bytes; by module, in order."""
    finished = WorkingCheckpoint(folder)
    found: dict[str, list[dict[str, Any]]] = {}
    for index in range(blocks):
        record = finished.block_record(index) or {}
        if "candidates" not in record:
            raise RecipeError("mixed_precision: its input has no candidates; a sensitivity stage comes right before it")
        found.update(record["candidates"])
    return found
