"""Choices of one candidate for every unit: their bytes, their predicted cost, and their divergence as measured."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from compress.allocation.budget import Sizes
from compress.allocation.fit import Fit, by_kind, fit
from compress.allocation.solver import BudgetError, cheapest
from compress.allocation.units import Unit
from compress.architecture import dimensions_of
from compress.checkpoints.candidates import Assigned, alone_records, candidates_in
from compress.checkpoints.skeleton import Skeleton
from compress.files import digest_of_json, write_json
from compress.quantization.scheme import Option, Scheme, label_of
from compress.stages.alone import factor
from compress.stages.base import StageContext
from compress.stages.candidates import CandidateStage
from compress.stages.tuning import Judged, TuningText

WORTH_FITTING = 1.0
"""Nats above which a divergence says nothing about small ones."""
HALVINGS = 8
"""Of the interval in which the smallest choice within a bound is looked for: 1/256 of it."""
Choice = tuple[int, ...]
"""The number of the candidate of each unit."""


class Choices:
    """What `sensitivity` left in a folder, put together and measured. Measurements are kept in `kept`, a JSON file."""

    def __init__(self, stage: CandidateStage, context: StageContext, kept: Path) -> None:
        assert context.windows is not None, "the pipeline gives calibration windows to stages that need them"
        self._kept, self.source = kept, context.source
        _, tuning = stage.split(context.windows)
        self.tuning = TuningText(context, tuning)
        skeleton = Skeleton(self.source.config, context.device, context.compute)
        self.blocks = skeleton.block_count
        matrices = skeleton.linear_shapes()
        if stage.vocabulary:
            names = (skeleton.architecture.embedding, skeleton.architecture.head)
            stored = [name for name in names if self.source.has(f"{name}.weight")]
            matrices |= {name: self.source.matrix_shape(name) for name in stored}
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
        self.schemes: dict[str, list[Option]] = {
            module: [each["scheme"] and Scheme.from_json(each["scheme"]) for each in rows]
            for module, rows in found.items()
        }
        predicted = self._summed(found, "cost")
        self.costs = scaled(self.units, predicted, alone_records(self.source.folder))
        self.bytes = self._summed(found, "bytes")
        self._known = self._read()

    def _summed(self, found: dict[str, list[dict[str, Any]]], what: str) -> list[list[Any]]:
        """By unit and option, the sum over the unit's modules."""
        return [
            [sum(each[what] for each in together) for together in zip(*(found[m] for m in unit.modules), strict=True)]
            for unit in self.units
        ]

    @property
    def measured(self) -> int:
        """Choices measured so far, kept ones included."""
        return len(self._known)

    def uniforms(self) -> list[Choice]:
        """What a mixture has to beat: one candidate for all linears, and where embedding and head are chosen for, one
        for each of those; of these only what no other is both smaller and cheaper than."""
        outside = [range(len(row)) for unit, row in zip(self.units, self.costs, strict=True) if unit.block is None]
        linears = len(self.units) - len(outside)
        found = [(number,) * linears + rest for number in self.numbers for rest in itertools.product(*outside)]
        return self.leading(found) if outside else found

    def leading(self, choices: Iterable[Choice]) -> list[Choice]:
        """The smallest first, those that no other is both smaller and predicted to be better than."""
        leading: list[Choice] = []
        for choice in sorted(choices, key=lambda each: (self.size(each), self.predicted(each))):
            if not leading or self.predicted(choice) < self.predicted(leading[-1]):
                leading.append(choice)
        return leading

    def predicted(self, choice: Choice) -> float:
        """The cost (nats a token) before anything is fitted."""
        return float(sum(row[k] for row, k in zip(self.costs, choice, strict=True)))

    def within(self, choices: Iterable[Choice], most: int) -> list[Choice]:
        """Those that take at most so many bytes."""
        return [choice for choice in choices if self.size(choice) <= most]

    def cheapest(self, costs: list[list[float]], most: int) -> Choice:
        """The cheapest choice within so many bytes. Raises BudgetError where nothing fits."""
        return tuple(cheapest(costs, self.bytes, most))

    def smallest(
        self,
        costs: list[list[float]],
        mixed: Sequence[Choice],
        accepted: Callable[[Choice], bool],
        advance: Callable[[str], None],
    ) -> Choice | None:
        """The smallest choice by `costs` that is `accepted`, by bisection between those of `mixed` that lie on either
        side; None where none of them is. Calls `advance` HALVINGS times."""
        found = [choice for choice in mixed if accepted(choice)]
        if not found:
            return None
        best = min(found, key=self.size)
        low = max(
            (self.size(choice) for choice in mixed if self.size(choice) < self.size(best)),
            default=sum(min(row) for row in self.bytes) - 1,
        )
        high = self.size(best)
        for _ in range(HALVINGS):
            middle = (low + high) // 2
            if middle > low:
                choice = self._or_none(costs, middle)
                if choice is not None and accepted(choice):
                    best, high = choice, self.size(choice)
                else:
                    low = middle
            advance(f"{8 * high / self.sizes.weights:.3f} bits")
        return best

    def _or_none(self, costs: list[list[float]], most: int) -> Choice | None:
        try:
            return self.cheapest(costs, most)
        except BudgetError:
            return None

    def size(self, choice: Choice) -> int:
        """Bytes of what is chosen for."""
        return sum(int(row[k]) for row, k in zip(self.bytes, choice, strict=True))

    def effective_bits(self, choice: Choice) -> float:
        return 8 * self.size(choice) / self.sizes.weights

    def label(self, choice: Choice) -> str:
        """A uniform choice in words: 'int4 symmetric group 64', and what embedding and head have beside it."""
        of = [label_of(self.schemes[unit.modules[0]][k]) for unit, k in zip(self.units, choice, strict=True)]
        outside = [f"{unit.kind} {name}" for unit, name in zip(self.units, of, strict=True) if unit.block is None]
        return "; ".join([of[0], *outside])

    def by_module(self, choice: Choice) -> dict[str, int]:
        return {module: k for unit, k in zip(self.units, choice, strict=True) for module in unit.modules}

    def judge(self, choice: Choice) -> Judged:
        """Measure a choice on the tuning windows; one that was measured before a kill is known."""
        key = digest_of_json(list(choice))
        if key not in self._known:
            judged = self.tuning.judge(Assigned(self.source.folder, self.schemes, self.by_module(choice)))
            self._known[key] = [judged.kl, judged.lost]
            self._keep()
        return Judged(*self._known[key])

    def _read(self) -> dict[str, list[float]]:
        found: dict[str, list[float]] = json.loads(self._kept.read_text()) if self._kept.is_file() else {}
        return found

    def _keep(self) -> None:
        """Add what is known to the file, where another frontier of the same recipe may have added to it meanwhile."""
        self._kept.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{self._kept}.lock"):
            self._known = {**self._read(), **self._known}
            write_json(self._kept, self._known)

    def fit(self, choices: Sequence[Choice]) -> Fit:
        """Factors from those choices whose divergence is small enough to say something."""
        kinds = [unit.family for unit in self.units]
        judged = [(choice, self.judge(choice).kl) for choice in choices]
        used = [(choice, kl) for choice, kl in judged if 0 < kl <= WORTH_FITTING] or [
            min(judged, key=lambda each: each[1])
        ]
        rows = [by_kind(kinds, [row[k] for row, k in zip(self.costs, choice, strict=True)]) for choice, _ in used]
        exact = {unit.family for unit in self.units if unit.block is None}
        return fit(rows, [max(kl, 1e-12) for _, kl in used], exact)

    def fitted_costs(self, found: Fit) -> list[list[float]]:
        return [
            [found.factors[unit.family] * cost for cost in row]
            for unit, row in zip(self.units, self.costs, strict=True)
        ]


def scaled(
    units: Sequence[Unit], costs: list[list[float]], alone: Mapping[str, tuple[int, float]]
) -> list[list[float]]:
    """Costs by unit and option, those of each unit by one factor such that what was measured of it alone agrees."""
    rows = []
    for unit, row in zip(units, costs, strict=True):
        number, kl = alone.get(unit.name, (0, 0.0))
        by = factor(kl, row[number])
        rows.append([by * cost for cost in row])
    return rows
