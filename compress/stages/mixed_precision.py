"""Which linear gets how many bits, within a budget: a precision plan that stages with `bits: planned` follow.

1. The cheapest choice by second-order costs (`sensitivity`) within the budget's bytes: an exact knapsack.
2. A few choices near the budget are put together from the candidates and their divergence from the source is measured
   on tuning windows; a factor for each kind of unit makes predictions agree (`allocation.fit`), and the knapsack is
   solved again.
3. Proposals: costs are disturbed and the knapsack solved again; one is taken if its measured divergence is lower.
4. Candidates that fit the budget uniformly are measured too. If the best of them is not beaten, it is the plan, and
   that is an event: a mixture has to earn its place.

Tuning windows are calibration windows that no candidate was computed from. Units are what a runtime fuses.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from compress.allocation.budget import Budget, Sizes
from compress.allocation.fit import Fit, by_kind, fit
from compress.allocation.solver import BudgetError, cheapest
from compress.allocation.units import Unit
from compress.architecture import dimensions_of
from compress.checkpoints.candidates import Assigned
from compress.checkpoints.reader import Checkpoint
from compress.checkpoints.skeleton import Skeleton
from compress.checkpoints.working import WorkingCheckpoint
from compress.errors import RecipeError, UnhealthySourceError
from compress.evaluation.measure import States, score, walk_states
from compress.events import Event, Quiet
from compress.files import digest_of_json, write_json
from compress.quantization.scheme import Scheme
from compress.stages.base import Shapes, StageContext, StageOutcome
from compress.stages.candidates import CandidateStage
from compress.training.clock import Clock

SPREAD_OF_PROBES = 1.0
"""Standard deviation of the logarithm by which costs are disturbed for choices that the fit is made from."""
SPREAD_OF_PROPOSALS = 0.3
"""The same, for proposals."""
UNIFORM_MEASURED = 3
"""Uniform choices within the budget that are measured: the largest."""
WORTH_FITTING = 1.0
"""Nats above which a divergence says nothing about small ones."""


class MixedPrecision(CandidateStage):
    """Choose a scheme for every linear within a budget of bytes; stages with `bits: planned` follow the choice."""

    kind: Literal["mixed_precision"] = "mixed_precision"
    budget: Budget = Field(description="exactly one of effective_bits, weight_bytes, ratio, serving_bytes")
    probes: int = Field(default=8, ge=0, description="random choices near the budget that predictions are fitted to")
    proposals: int = Field(default=12, ge=0, description="disturbed choices that are measured, and taken if better")
    draws: ClassVar[bool] = True
    plans_precision: ClassVar[bool] = True

    @property
    def forwards(self) -> float:
        # Of the tuning windows only, whose share of the calibration text is about an eighth.
        return (self.probes + self.proposals + 6) / 8

    def schemes(self, shapes: Shapes) -> dict[str, Scheme]:
        return {}

    def schemes_within(self, sizes: Sizes, units: list[Unit]) -> dict[str, Scheme]:
        """A choice within the budget before anything is known of the model, as if an error of a weight cost the same
        everywhere: what `plan` predicts bytes from. Raises RecipeError naming the smallest budget that is feasible."""
        options = [[[self.options(module)[k] for module in unit.modules] for k in self._numbers] for unit in units]
        bytes_ = [
            [_bytes(unit, schemes, sizes) for schemes in choices] for unit, choices in zip(units, options, strict=True)
        ]
        costs = [
            [
                sum(
                    math.prod(sizes.matrices[module])
                    * 4.0**-scheme.bits
                    * (1 + 4 / scheme.width(sizes.matrices[module][1]))
                    for module, scheme in zip(unit.modules, schemes, strict=True)
                )
                for schemes in choices
            ]
            for unit, choices in zip(units, options, strict=True)
        ]
        found = self.solved(costs, bytes_, sizes)
        return {
            module: scheme
            for unit, choices, option in zip(units, options, found, strict=True)
            for module, scheme in zip(unit.modules, choices[option], strict=True)
        }

    @property
    def _numbers(self) -> range:
        return range(len(self.candidates))

    def solved(self, costs: list[list[float]], bytes_: list[list[int]], sizes: Sizes) -> list[int]:
        """The cheapest choice. Raises RecipeError where nothing fits the budget."""
        try:
            return cheapest(costs, bytes_, self.budget.linear_bytes(sizes))
        except BudgetError as error:
            raise RecipeError(self._infeasible(error.smallest, sizes)) from None

    def _infeasible(self, smallest: int, sizes: Sizes) -> str:
        budget = self.budget
        taken = [f"{name.replace('_', ' ')} {size:,}" for name, size in budget.taken(sizes).items()]
        if budget.effective_bits is None:
            taken.append(f"tensors that are not quantised {sizes.other_bytes:,}")
        beside = f" Beside them: {', '.join(taken)} bytes." if taken else ""
        return (
            f"mixed_precision: budget {budget.words(budget.amount)}: linears take {smallest:,} bytes at the smallest "
            f"candidates.{beside} The smallest feasible budget is {budget.words(budget.amount_for(smallest, sizes))}; "
            "or give candidates with fewer bits."
        )

    def apply(self, context: StageContext) -> StageOutcome:
        return _Run(self, context).outcome()


def _bytes(unit: Unit, schemes: list[Scheme], sizes: Sizes) -> int:
    return sum(
        scheme.stored_bytes(*sizes.matrices[module], scale_bytes=sizes.stored_bytes)
        for module, scheme in zip(unit.modules, schemes, strict=True)
    )


@dataclass
class _Measured:
    """Choices and their divergence in nats, in the order they were measured."""

    choices: list[list[int]] = field(default_factory=list)
    divergences: list[float] = field(default_factory=list)

    def add(self, choice: list[int], divergence: float) -> None:
        self.choices.append(choice)
        self.divergences.append(divergence)


class _Run:
    """One application of the stage."""

    def __init__(self, stage: MixedPrecision, context: StageContext) -> None:
        assert context.windows is not None, "the pipeline gives calibration windows to stages that need them"
        self.stage, self.context, self.source = stage, context, context.source
        _, self.tuning = stage.split(context.windows)
        skeleton = Skeleton(self.source.config, context.device, context.compute)
        self.architecture, self.blocks = skeleton.architecture, skeleton.block_count
        matrices = skeleton.linear_shapes()
        self.units = stage.units(self.architecture, matrices)
        self.sizes = Sizes.of(
            skeleton.parameter_shapes(),
            {module: matrices[module] for unit in self.units for module in unit.modules},
            dimensions_of(skeleton.config),
            context.stored.itemsize,
            context.origin.weight_bytes,
        )
        found = candidates_in(self.source.folder, self.blocks)
        self.schemes = {module: [Scheme.from_json(each["scheme"]) for each in rows] for module, rows in found.items()}
        self.costs = [
            [sum(found[module][k]["cost"] for module in unit.modules) for k in self._numbers] for unit in self.units
        ]
        self.bytes = [
            [sum(found[module][k]["bytes"] for module in unit.modules) for k in self._numbers] for unit in self.units
        ]
        self.generator = np.random.default_rng(context.seed)
        self.clock = Clock("measuring", "solving", "write")
        self.events: list[Event] = []
        self.kept = context.output.scratch / "measured.json"
        self.known: dict[str, float] = json.loads(self.kept.read_text()) if self.kept.is_file() else {}

    @property
    def _numbers(self) -> range:
        return range(len(self.stage.candidates))

    def outcome(self) -> StageOutcome:
        limit = self.stage.budget.linear_bytes(self.sizes)
        with self.clock.timed("solving"):
            first = self.stage.solved(self.costs, self.bytes, self.sizes)
        uniform = [[k] * len(self.units) for k in self._numbers if self._size([k] * len(self.units)) <= limit]
        # A smaller uniform choice of the same widths hardly ever wins; the largest few are what it has to beat.
        uniform = sorted(uniform, key=self._size)[-UNIFORM_MEASURED:]
        total = 1 + len(uniform) + self.stage.probes + 1 + self.stage.proposals
        with self.context.progress.task("mixed_precision", total) as advance, self.clock.timed("measuring"):
            self._walk_source()
            measured = _Measured()
            for choice in [*uniform, first]:
                measured.add(choice, self._divergence(choice))
                advance(f"measured {len(measured.choices)}")
            for _ in range(self.stage.probes):
                probe = self._disturbed(self.costs, SPREAD_OF_PROBES)
                measured.add(probe, self._divergence(probe))
                advance(f"measured {len(measured.choices)}")
            found = self._fit(measured)
            costs = [
                [found.factors[unit.kind] * cost for cost in row]
                for unit, row in zip(self.units, self.costs, strict=True)
            ]
            fitted = self.stage.solved(costs, self.bytes, self.sizes)
            mixed = _Measured([first], [self._divergence(first)])
            mixed.add(fitted, self._divergence(fitted))
            advance("fitted")
            tried = {tuple(choice) for choice in (*measured.choices, fitted)}
            for number in range(self.stage.proposals):
                proposal = self._disturbed(costs, SPREAD_OF_PROPOSALS)
                if tuple(proposal) not in tried:
                    tried.add(tuple(proposal))
                    mixed.add(proposal, self._divergence(proposal))
                advance(f"proposal {number + 1}/{self.stage.proposals}")
        best = int(np.argmin(mixed.divergences))
        plain = [self._divergence(choice) for choice in uniform]
        wins = not plain or mixed.divergences[best] < min(plain)
        chosen = mixed.choices[best] if wins else uniform[int(np.argmin(plain))]
        if not wins:
            self._kept_uniform(chosen, min(plain), mixed.divergences[best])
        facts = self._facts(chosen, limit, found, costs, uniform, plain, mixed, best, wins)
        with self.clock.timed("write"):
            self._write(chosen)
        return StageOutcome([], self.events, self.clock.seconds, facts)

    def _walk_source(self) -> None:
        self.states = self._walk(self.source)

    def _walk(self, checkpoint: Checkpoint) -> States:
        context = self.context
        sets = {"tuning": self.tuning}
        return walk_states(checkpoint, sets, context.device, context.compute, context.tokens_at_once, Quiet(), "")

    def _divergence(self, choice: list[int]) -> float:
        """Mean KL to the source on the tuning windows, nats a token; what was measured before a kill is known."""
        key = digest_of_json(choice)
        if key not in self.known:
            context = self.context
            assigned = Assigned(self.source.folder, self.schemes, self._by_module(choice))
            sets = {"tuning": self.tuning}
            states = self._walk(assigned)
            found = score(
                (self.source, self.states), (assigned, states), sets, context.device, context.compute, Quiet()
            )
            scores = found["tuning"]
            self.known[key] = float(scores.divergence[scores.counts].double().mean())
            if not math.isfinite(self.known[key]):
                raise UnhealthySourceError(
                    "mixed_precision: a choice of candidates gave a divergence that is no number"
                )
            self.kept.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.kept, self.known)
        return self.known[key]

    def _by_module(self, choice: list[int]) -> dict[str, int]:
        return {module: k for unit, k in zip(self.units, choice, strict=True) for module in unit.modules}

    def _size(self, choice: list[int]) -> int:
        return sum(row[k] for row, k in zip(self.bytes, choice, strict=True))

    def _disturbed(self, costs: list[list[float]], spread: float) -> list[int]:
        """The cheapest choice if the costs of each unit were off by a factor."""
        factors = np.exp(self.generator.normal(0, spread, len(costs)))
        return self.stage.solved(
            [[factor * cost for cost in row] for factor, row in zip(factors, costs, strict=True)],
            self.bytes,
            self.sizes,
        )

    def _fit(self, measured: _Measured) -> Fit:
        """Factors from every choice whose divergence is small enough to say something."""
        rows = [
            by_kind([unit.kind for unit in self.units], [row[k] for row, k in zip(self.costs, choice, strict=True)])
            for choice in measured.choices
        ]
        worth = [at for at, divergence in enumerate(measured.divergences) if 0 < divergence <= WORTH_FITTING]
        used = worth or [int(np.argmin(measured.divergences))]
        return fit([rows[at] for at in used], [max(measured.divergences[at], 1e-12) for at in used])

    def _kept_uniform(self, chosen: list[int], uniform: float, mixed: float) -> None:
        label = self.schemes[self.units[0].modules[0]][chosen[0]].label
        message = (
            f"{label} everywhere has a divergence of {uniform:.4g} on the tuning windows, the best mixture within the "
            f"budget {mixed:.4g}: the plan is uniform"
        )
        self.events.append(Event("uniform_kept", "mixed_precision", message, {"uniform": uniform, "mixed": mixed}))

    def _facts(
        self,
        chosen: list[int],
        limit: int,
        found: Fit,
        costs: list[list[float]],
        uniform: list[list[int]],
        plain: list[float],
        mixed: _Measured,
        best: int,
        wins: bool,
    ) -> dict[str, Any]:
        label = self.schemes[self.units[0].modules[0]]
        return {
            "budget": {"kind": self.stage.budget.kind, "amount": self.stage.budget.amount},
            "taken_beside_weights": self.stage.budget.taken(self.sizes),
            "other_bytes": self.sizes.other_bytes,
            "limit_bytes": limit,
            "linear_bytes": self._size(chosen),
            "effective_bits": 8 * self._size(chosen) / self.sizes.weights,
            "tuning_tokens": self.tuning.tokens,
            "plan": "mixed" if wins else "uniform",
            "kl": mixed.divergences[best] if wins else min(plain),
            "kl_of_first": mixed.divergences[0],
            "kl_of_fitted": mixed.divergences[1],
            "uniform": [
                {"scheme": label[choice[0]].label, "bytes": self._size(choice), "kl": divergence}
                for choice, divergence in zip(uniform, plain, strict=True)
            ],
            "fit": {
                "factors": found.factors,
                "r2": found.r2,
                "rank": found.rank,
                "predicted": list(found.predicted),
                "measured": list(found.measured),
            },
            "choices": len(self.known),
            "units": [
                {
                    "name": unit.name,
                    "block": unit.block,
                    "kind": unit.kind,
                    "scheme": self.schemes[unit.modules[0]][k].label,
                    "bits": self.schemes[unit.modules[0]][k].bits,
                    "cost": row[k],
                    "sensitivity": max(row) if len(row) else 0.0,
                }
                for unit, k, row in zip(self.units, chosen, costs, strict=True)
            ],
        }

    def _write(self, chosen: list[int]) -> None:
        """The model as it was, and the plan."""
        output = self.context.output
        output.write_outer(self.source)
        for index in range(self.blocks):
            if output.block_record(index) is None:
                output.write_block(self.source, index, {}, {"modules": [], "events": []})
                self.context.after_block(index)
        plan = {module: self.schemes[module][k] for module, k in self._by_module(chosen).items()}
        output.write_plan(plan)


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
