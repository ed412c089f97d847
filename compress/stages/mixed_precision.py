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

import dataclasses
import math
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from compress.allocation.budget import Budget, Sizes
from compress.allocation.fit import Fit
from compress.allocation.solver import BudgetError, cheapest
from compress.allocation.units import Unit
from compress.errors import RecipeError
from compress.events import Event
from compress.quantization.scheme import Scheme
from compress.stages.base import Shapes, StageContext, StageOutcome
from compress.stages.candidates import CandidateStage
from compress.stages.choices import Choice, Choices
from compress.training.clock import Clock

SPREAD_OF_PROBES = 1.0
"""Standard deviation of the logarithm by which costs are disturbed for choices that the fit is made from."""
SPREAD_OF_PROPOSALS = 0.3
"""The same, for proposals."""
UNIFORM_MEASURED = 3
"""Uniform choices within the budget that are measured: the largest."""


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
            [self._bytes(unit, schemes, sizes) for schemes in choices]
            for unit, choices in zip(units, options, strict=True)
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

    def _bytes(self, unit: Unit, schemes: list[Scheme], sizes: Sizes) -> int:
        return sum(
            self.format.stored_bytes(scheme, *sizes.matrices[module], sizes.stored_bytes)
            for module, scheme in zip(unit.modules, schemes, strict=True)
        )

    def apply(self, context: StageContext) -> StageOutcome:
        return _Run(self, context).outcome()


class _Run:
    """One application of the stage."""

    def __init__(self, stage: MixedPrecision, context: StageContext) -> None:
        self.stage, self.context = stage, context
        self.choices = Choices(stage, context, context.output.scratch / "measured.json")
        self.generator = np.random.default_rng(context.seed)
        self.clock = Clock("measuring", "write")
        self.events: list[Event] = []

    def outcome(self) -> StageOutcome:
        stage, choices = self.stage, self.choices
        limit = stage.budget.linear_bytes(choices.sizes)
        first = self._solved(choices.costs)
        fitting = [choice for k in choices.numbers if choices.size(choice := choices.uniform(k)) <= limit]
        # A smaller uniform choice hardly ever wins; the largest few are what a mixture has to beat.
        uniform = sorted(fitting, key=choices.size)[-UNIFORM_MEASURED:]
        mixed, fitted, found, costs = self._measure(uniform, first)
        best = min(mixed, key=lambda choice: choices.judge(choice).kl)
        plain = min(uniform, key=lambda choice: choices.judge(choice).kl, default=None)
        wins = plain is None or choices.judge(best).kl < choices.judge(plain).kl
        chosen = best if wins or plain is None else plain
        if not wins and plain is not None:
            self._kept_uniform(plain, best)
        facts = self._facts(chosen, uniform, first, fitted, found, costs)
        with self.clock.timed("write"):
            self._write(chosen)
        return StageOutcome([], self.events, self.clock.seconds, facts)

    def _measure(self, uniform: list[Choice], first: Choice) -> tuple[list[Choice], Choice, Fit, list[list[float]]]:
        """Measure everything that may become the plan: all mixtures, the one by fitted costs, the fit and its costs."""
        stage, choices = self.stage, self.choices
        total = len(uniform) + 1 + stage.probes + 1 + stage.proposals
        with self.context.progress.task("mixed_precision", total) as advance, self.clock.timed("measuring"):
            mixed = [first]
            for choice in (*uniform, first):
                choices.judge(choice)
                advance("measured what the budget allows everywhere, and the cheapest mixture")
            for number in range(stage.probes):
                mixed.append(self._disturbed(choices.costs, SPREAD_OF_PROBES))
                choices.judge(mixed[-1])
                advance(f"probe {number + 1}/{stage.probes}")
            found = choices.fit([*uniform, *mixed])
            costs = choices.fitted_costs(found)
            fitted = self._solved(costs)
            mixed.append(fitted)
            choices.judge(fitted)
            advance("fitted")
            for number in range(stage.proposals):
                mixed.append(self._disturbed(costs, SPREAD_OF_PROPOSALS))
                choices.judge(mixed[-1])
                advance(f"proposal {number + 1}/{stage.proposals}")
        return mixed, fitted, found, costs

    def _facts(
        self, chosen: Choice, uniform: list[Choice], first: Choice, fitted: Choice, found: Fit, costs: list[list[float]]
    ) -> dict[str, Any]:
        """What the report tells of the choice."""
        stage, choices = self.stage, self.choices
        return {
            "budget": {"kind": stage.budget.kind, "amount": stage.budget.amount},
            "taken_beside_weights": stage.budget.taken(choices.sizes),
            "other_bytes": choices.sizes.other_bytes,
            "limit_bytes": stage.budget.linear_bytes(choices.sizes),
            "linear_bytes": choices.size(chosen),
            "effective_bits": choices.effective_bits(chosen),
            "tuning_tokens": choices.tuning.tokens,
            "plan": "uniform" if chosen in uniform else "mixed",
            "kl": choices.judge(chosen).kl,
            "kl_of_first": choices.judge(first).kl,
            "kl_of_fitted": choices.judge(fitted).kl,
            "choices_measured": choices.measured,
            "uniform": [
                {"scheme": choices.label(choice[0]), "bytes": choices.size(choice), "kl": choices.judge(choice).kl}
                for choice in uniform
            ],
            "fit": dataclasses.asdict(found),
            "units": self._units(chosen, costs),
        }

    def _solved(self, costs: list[list[float]]) -> Choice:
        return tuple(self.stage.solved(costs, self.choices.bytes, self.choices.sizes))

    def _disturbed(self, costs: list[list[float]], spread: float) -> Choice:
        """The cheapest choice if the costs of each unit were off by a factor."""
        factors = np.exp(self.generator.normal(0, spread, len(costs)))
        return self._solved([[factor * cost for cost in row] for factor, row in zip(factors, costs, strict=True)])

    def _kept_uniform(self, plain: Choice, best: Choice) -> None:
        uniform, mixed = self.choices.judge(plain).kl, self.choices.judge(best).kl
        message = (
            f"{self.choices.label(plain[0])} everywhere has a divergence of {uniform:.4g} on the tuning windows, the "
            f"best mixture within the budget {mixed:.4g}: the plan is uniform"
        )
        self.events.append(Event("uniform_kept", "mixed_precision", message, {"uniform": uniform, "mixed": mixed}))

    def _units(self, chosen: Choice, costs: list[list[float]]) -> list[dict[str, Any]]:
        """What each unit got, what that is predicted to cost in nats, and what its dearest candidate would."""
        rows = []
        for unit, k, row in zip(self.choices.units, chosen, costs, strict=True):
            scheme = self.choices.schemes[unit.modules[0]][k]
            named = {"name": unit.name, "block": unit.block, "kind": unit.kind}
            rows.append({**named, "scheme": scheme.label, "bits": scheme.bits, "cost": row[k], "sensitivity": max(row)})
        return rows

    def _write(self, chosen: Choice) -> None:
        """The model as it was, and the plan."""
        output, source = self.context.output, self.choices.source
        output.write_outer(source)
        for index in range(self.choices.blocks):
            if output.block_record(index) is None:
                output.write_block(source, index, {}, {"modules": [], "events": []})
                self.context.after_block(index)
        schemes = self.choices.schemes
        output.write_plan({module: schemes[module][k] for module, k in self.choices.by_module(chosen).items()})
