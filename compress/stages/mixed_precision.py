"""Which linear gets how many bits, within a budget: a precision plan that stages with `bits: planned` follow.

1. The cheapest choice by second-order costs (`sensitivity`) within the budget's bytes: an exact knapsack.
2. A few choices near the budget are put together from the candidates and their divergence from the source is measured
   on tuning windows; a factor for each kind of unit makes predictions agree (`allocation.fit`), and the knapsack is
   solved again.
3. Proposals: costs are disturbed and the knapsack solved again; one is taken if its measured divergence is lower.
4. Candidates that fit the budget uniformly are measured too. If the best of them is not beaten, it is the plan, and
   that is an event: a mixture has to earn its place.

With `stop: first_pass` bytes are what is looked for, and `bounds` on the divergence are given (`_FirstPass`).

Tuning windows are calibration windows that no candidate was computed from. Units are what a runtime fuses.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from compress.allocation.bounds import Bounds
from compress.allocation.budget import Budget, Sizes
from compress.allocation.fit import Fit
from compress.allocation.solver import BudgetError, cheapest
from compress.allocation.units import Unit
from compress.errors import RecipeError
from compress.events import Event
from compress.quantization.scheme import Option, Scheme, label_of
from compress.stages.base import Shapes, StageContext, StageOutcome
from compress.stages.candidates import CandidateStage
from compress.stages.choices import HALVINGS, Choice, Choices
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
    budget: Budget | None = Field(
        default=None,
        description="exactly one of effective_bits, weight_bytes, ratio, serving_bytes; with stop: first_pass the most "
        "it may be, or left out",
    )
    stop: Literal["budget", "first_pass"] = Field(
        default="budget",
        description="budget: the best mixture within it; first_pass: the smallest mixture that stays within bounds",
    )
    bounds: Bounds | None = Field(
        default=None,
        description="of stop: first_pass, on the tuning windows; left out: the tightest that the recipe's gates set on "
        "mean KL and perplexity",
    )
    share_of_bounds: float = Field(
        default=0.8,
        gt=0,
        le=1,
        description="how much of what bounds allow may be used on tuning windows, which are not the gates' text",
    )
    probes: int = Field(default=8, ge=0, description="random choices near the budget that predictions are fitted to")
    proposals: int = Field(default=12, ge=0, description="disturbed choices that are measured, and taken if better")
    draws: ClassVar[bool] = True
    plans_precision: ClassVar[bool] = True

    @model_validator(mode="after")
    def _something_to_stop_at(self) -> MixedPrecision:
        if self.stop == "budget" and self.budget is None:
            raise ValueError("give a budget, or stop: first_pass")
        if self.stop == "budget" and (self.bounds is not None or "share_of_bounds" in self._changed):
            raise ValueError("bounds and share_of_bounds belong to stop: first_pass")
        return self

    @property
    def _changed(self) -> set[str]:
        fields = type(self).model_fields
        return {name for name in self.model_fields_set if getattr(self, name) != fields[name].default}

    @property
    def needs_bounds(self) -> bool:
        """Whether the recipe's gates have to say what to stay within."""
        return self.stop == "first_pass" and self.bounds is None

    @property
    def forwards(self) -> float:
        # Of the tuning windows only, whose share of the calibration text is about an eighth.
        more = HALVINGS + 4 if self.stop == "first_pass" else 0
        return (self.probes + self.proposals + 6 + more) / 8

    def schemes(self, shapes: Shapes) -> dict[str, Scheme]:
        return {}

    def schemes_within(self, sizes: Sizes, units: list[Unit]) -> dict[str, Scheme]:
        """A choice within the budget before anything is known of the model, as if an error of a weight cost the same
        everywhere: what `plan` predicts bytes from. Raises RecipeError naming the smallest budget that is feasible."""
        options = [self.options_in(unit) for unit in units]
        bytes_ = [
            [self._bytes(unit, schemes, sizes) for schemes in choices]
            for unit, choices in zip(units, options, strict=True)
        ]
        costs = [
            [
                sum(
                    _as_if_alike(scheme, sizes.matrices[module])
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
            if scheme is not None
        }

    def most_bytes(self, bytes_: list[list[int]], sizes: Sizes) -> int:
        """What the matrices may take at most: by the budget, or as much as they can."""
        return sum(max(row) for row in bytes_) if self.budget is None else self.budget.linear_bytes(sizes)

    def solved(self, costs: list[list[float]], bytes_: list[list[int]], sizes: Sizes) -> list[int]:
        """The cheapest choice. Raises RecipeError where nothing fits the budget."""
        try:
            return cheapest(costs, bytes_, self.most_bytes(bytes_, sizes))
        except BudgetError as error:
            assert self.budget is not None, "without a budget everything fits"
            raise RecipeError(self._infeasible(self.budget, error.smallest, sizes)) from None

    @property
    def _what(self) -> str:
        return "linears and vocabulary" if self.vocabulary else "linears"

    def _infeasible(self, budget: Budget, smallest: int, sizes: Sizes) -> str:
        taken = [f"{name.replace('_', ' ')} {size:,}" for name, size in budget.taken(sizes).items()]
        if budget.effective_bits is None:
            taken.append(f"tensors that are not quantised {sizes.other_bytes:,}")
        beside = f" Beside them: {', '.join(taken)} bytes." if taken else ""
        feasible = budget.words(budget.amount_for(smallest, sizes))
        return (
            f"mixed_precision: budget {budget.words(budget.amount)}: {self._what} take {smallest:,} bytes at the "
            f"smallest candidates.{beside} The smallest feasible budget is {feasible}; or give candidates with fewer "
            "bits."
        )

    def explained(self, sizes: Sizes) -> str:
        """What a run will go by, for `plan`."""
        if self.stop == "budget":
            assert self.budget is not None
            return self.budget.explained(sizes, self._what)
        bounds = self.bounds.words if self.bounds else "what the gates allow"
        said = f"first_pass: the smallest mixture within {self.share_of_bounds:g} of {bounds} on tuning windows"
        most = f"; at most {self.budget.explained(sizes, self._what)}" if self.budget else ""
        return f"{said}; bytes are predicted for the largest{most}"

    def _bytes(self, unit: Unit, schemes: list[Option], sizes: Sizes) -> int:
        return sum(
            self.option_bytes(scheme, sizes.matrices[module], sizes.stored_bytes)
            for module, scheme in zip(unit.modules, schemes, strict=True)
        )

    def apply(self, context: StageContext) -> StageOutcome:
        run = _FirstPass if self.stop == "first_pass" else _WithinBudget
        return run(self, context).outcome()


def _as_if_alike(option: Option, shape: tuple[int, int]) -> float:
    """The cost of rounding a matrix (rows, columns) if an error of a weight cost the same everywhere, in any unit."""
    if option is None:
        return 0.0
    return math.prod(shape) * 4.0**-option.bits * (1 + 4 / option.width(shape[1]))


@dataclass(frozen=True)
class _Found:
    """What was measured, and what became of it: the plan, its rivals, the first and the fitted choice, the fit."""

    chosen: Choice
    uniform: list[Choice]
    first: Choice
    fitted: Choice
    fit: Fit
    costs: list[list[float]]


class _Run:
    """One application of the stage. Subclasses find the plan."""

    def __init__(self, stage: MixedPrecision, context: StageContext) -> None:
        self.stage, self.context = stage, context
        self.choices = Choices(stage, context, context.output.scratch / "measured.json")
        self.limit = stage.most_bytes(self.choices.bytes, self.choices.sizes)
        self.generator = np.random.default_rng(context.seed)
        self.clock = Clock("measuring", "write")
        self.events: list[Event] = []

    def outcome(self) -> StageOutcome:
        found = self.found()
        with self.clock.timed("write"):
            self._write(found.chosen)
        return StageOutcome([], self.events, self.clock.seconds, self._facts(found))

    def found(self) -> _Found:
        raise NotImplementedError

    def rivals(self) -> list[Choice]:
        """Uniform choices within the budget, the smallest first; each is predicted to be better than smaller ones."""
        return self.choices.within(self.choices.leading(self.choices.uniforms()), self.limit)

    def disturbed(self, costs: list[list[float]], spread: float, most: int) -> Choice:
        """The cheapest choice within so many bytes if the costs of each unit were off by a factor."""
        factors = np.exp(self.generator.normal(0, spread, len(costs)))
        rows = [[factor * cost for cost in row] for factor, row in zip(factors, costs, strict=True)]
        return self.choices.cheapest(rows, most)

    def keep_uniform(self, plain: Choice, message: str, **values: float) -> None:
        self.events.append(Event("uniform_kept", "mixed_precision", message, values))

    def _facts(self, found: _Found) -> dict[str, Any]:
        """What the report tells of the choice."""
        stage, choices, budget, chosen = self.stage, self.choices, self.stage.budget, found.chosen
        asked = {} if budget is None else {"budget": {"kind": budget.kind, "amount": budget.amount}}
        return {
            "stop": stage.stop,
            **asked,
            **({"bounds": stage.bounds.words, "share_of_bounds": stage.share_of_bounds} if stage.bounds else {}),
            "taken_beside_weights": {} if budget is None else budget.taken(choices.sizes),
            "other_bytes": choices.sizes.other_bytes,
            "limit_bytes": self.limit,
            "linear_bytes": choices.size(chosen),
            "effective_bits": choices.effective_bits(chosen),
            "tuning_tokens": choices.tuning.tokens,
            "plan": "uniform" if chosen in found.uniform else "mixed",
            "kl": choices.judge(chosen).kl,
            "perplexity_ratio": choices.judge(chosen).perplexity_ratio,
            "kl_of_first": choices.judge(found.first).kl,
            "kl_of_fitted": choices.judge(found.fitted).kl,
            "choices_measured": choices.measured,
            "uniform": [
                {"scheme": choices.label(choice), "bytes": choices.size(choice), "kl": choices.judge(choice).kl}
                for choice in found.uniform
            ],
            "fit": dataclasses.asdict(found.fit),
            "units": self._units(chosen, found.costs),
        }

    def _units(self, chosen: Choice, costs: list[list[float]]) -> list[dict[str, Any]]:
        """What each unit got, what that is predicted to cost in nats, and what its dearest candidate would."""
        rows = []
        for unit, k, row in zip(self.choices.units, chosen, costs, strict=True):
            scheme = self.choices.schemes[unit.modules[0]][k]
            named = {"name": unit.name, "block": unit.block, "kind": unit.kind}
            bits = 16 if scheme is None else scheme.bits
            said = {"scheme": label_of(scheme), "bits": bits, "cost": row[k], "sensitivity": max(row)}
            rows.append({**named, **said})
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
        chosen_for = {module: schemes[module][k] for module, k in self.choices.by_module(chosen).items()}
        output.write_plan({module: scheme for module, scheme in chosen_for.items() if scheme is not None})


class _WithinBudget(_Run):
    """The least divergence within a number of bytes."""

    def found(self) -> _Found:
        choices, limit = self.choices, self.limit
        first = tuple(self.stage.solved(choices.costs, choices.bytes, choices.sizes))
        # A smaller uniform choice hardly ever wins; the largest few are what a mixture has to beat.
        uniform = self.rivals()[-UNIFORM_MEASURED:]
        mixed, fitted, found, costs = self._measure(uniform, first, limit)
        best = min(mixed, key=lambda choice: choices.judge(choice).kl)
        plain = min(uniform, key=lambda choice: choices.judge(choice).kl, default=None)
        if plain is None or choices.judge(best).kl < choices.judge(plain).kl:
            return _Found(best, uniform, first, fitted, found, costs)
        of_uniform, of_mixed = choices.judge(plain).kl, choices.judge(best).kl
        message = (
            f"{choices.label(plain)} everywhere has a divergence of {of_uniform:.4g} on the tuning windows, the "
            f"best mixture within the budget {of_mixed:.4g}: the plan is uniform"
        )
        self.keep_uniform(plain, message, uniform=of_uniform, mixed=of_mixed)
        return _Found(plain, uniform, first, fitted, found, costs)

    def _measure(
        self, uniform: list[Choice], first: Choice, limit: int
    ) -> tuple[list[Choice], Choice, Fit, list[list[float]]]:
        """Measure everything that may become the plan: all mixtures, the one by fitted costs, the fit and its costs."""
        stage, choices = self.stage, self.choices
        total = len(uniform) + 1 + stage.probes + 1 + stage.proposals
        with self.context.progress.task("mixed_precision", total) as advance, self.clock.timed("measuring"):
            mixed = [first]
            for choice in (*uniform, first):
                choices.judge(choice)
                advance("measured what the budget allows everywhere, and the cheapest mixture")
            for number in range(stage.probes):
                mixed.append(self.disturbed(choices.costs, SPREAD_OF_PROBES, limit))
                choices.judge(mixed[-1])
                advance(f"probe {number + 1}/{stage.probes}")
            found = choices.fit([*uniform, *mixed])
            costs = choices.fitted_costs(found)
            fitted = choices.cheapest(costs, limit)
            mixed.append(fitted)
            choices.judge(fitted)
            advance("fitted")
            for number in range(stage.proposals):
                mixed.append(self.disturbed(costs, SPREAD_OF_PROPOSALS, limit))
                choices.judge(mixed[-1])
                advance(f"proposal {number + 1}/{stage.proposals}")
        return mixed, fitted, found, costs


class _FirstPass(_Run):
    """The fewest bytes whose divergence stays within the bounds.

    1. `probes` mixtures at budgets evenly apart are measured, and costs are fitted to them as with a budget.
    2. The smallest mixture by fitted costs within the bounds is found by bisection between those.
    3. Proposals: disturbed costs, solved within a byte less; one that is within the bounds is the new smallest.
    4. The smallest uniform choice within the bounds, also by bisection, has to be larger, or it is the plan.
    """

    def within(self, choice: Choice) -> bool:
        judged = self.choices.judge(choice)
        assert self.stage.bounds is not None, "a recipe's bounds are filled in when it is read"
        return self.stage.bounds.hold(judged.kl, judged.lost, self.stage.share_of_bounds)

    def found(self) -> _Found:
        stage, choices = self.stage, self.choices
        first = tuple(stage.solved(choices.costs, choices.bytes, choices.sizes))
        least = sum(min(row) for row in choices.bytes)
        count = max(1, stage.probes)
        total = count + HALVINGS + stage.proposals
        with self.context.progress.task("mixed_precision", total) as advance, self.clock.timed("measuring"):
            mixed = [first]
            for step in range(1, count):
                mixed.append(choices.cheapest(choices.costs, least + (self.limit - least) * step // count))
            for choice in mixed:
                choices.judge(choice)
                advance("a mixture of some size")
            found = choices.fit(mixed)
            costs = choices.fitted_costs(found)
            fitted = choices.cheapest(costs, self.limit)
            mixed.append(fitted)
            best = choices.smallest(costs, mixed, self.within, advance)
            for number in range(stage.proposals if best else 0):
                smaller = self._smaller(costs, best, least)
                best = smaller if smaller is not None and self.within(smaller) else best
                advance(f"proposal {number + 1}/{stage.proposals}")
            plain, uniform = self._smallest_uniform()
        if best is None and plain is None:
            closest = min((*mixed, *uniform), key=lambda choice: choices.judge(choice).kl)
            judged = choices.judge(closest)
            assert stage.bounds is not None
            raise RecipeError(
                f"mixed_precision: nothing measured stays within {stage.share_of_bounds:g} of {stage.bounds.words} on "
                f"the tuning windows; the closest has a mean KL of {judged.kl:.4g} and {judged.perplexity_ratio:.4g} "
                f"times the perplexity. Give candidates with more bits{', a larger budget' if stage.budget else ''}, "
                "wider gates or bounds, or a larger share_of_bounds."
            )
        if best is None or (plain is not None and choices.size(plain) <= choices.size(best)):
            assert plain is not None
            sizes = {"uniform": choices.size(plain), **({"mixed": choices.size(best)} if best else {})}
            message = (
                f"{choices.label(plain)} everywhere stays within the bounds in {sizes['uniform']:,} bytes, and no "
                "mixture that was measured does in fewer: the plan is uniform"
            )
            self.keep_uniform(plain, message, **sizes)
            best = plain
        return _Found(best, uniform, first, fitted, found, costs)

    def _smaller(self, costs: list[list[float]], best: Choice | None, least: int) -> Choice | None:
        """A mixture of disturbed costs that is smaller than the best one."""
        assert best is not None
        most = self.choices.size(best) - 1
        return self.disturbed(costs, SPREAD_OF_PROPOSALS, most) if most >= least else None

    def _smallest_uniform(self) -> tuple[Choice | None, list[Choice]]:
        """The smallest uniform choice within the bounds, and those that were measured."""
        rivals, measured, low = self.rivals(), [], 0
        high = len(rivals)
        while low < high:
            middle = (low + high) // 2
            measured.append(rivals[middle])
            if self.within(rivals[middle]):
                high = middle
            else:
                low = middle + 1
        return (rivals[high] if high < len(rivals) else None), sorted(measured, key=self.choices.size)
