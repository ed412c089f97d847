"""How `mixed_precision` finds its plan.

1. The cheapest choice by second-order costs (`sensitivity`) within the budget's bytes: an exact knapsack.
2. A few choices near the budget are put together from the candidates and their divergence from the source is measured
   on tuning windows; a factor for each kind of unit makes predictions agree (`allocation.fit`), and the knapsack is
   solved again.
3. Proposals: the costs whose choice was the better one, fitted or not, are disturbed and the knapsack solved again; a
   proposal is taken if its measured divergence is lower.
4. Candidates that fit the budget uniformly are measured too. If the best of them is not beaten, it is the plan, and
   that is an event: a mixture has to earn its place.

With `stop: first_pass` bytes are what is looked for, and `bounds` on the divergence are given (`FirstPass`).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.allocation.bounds import Bounds
from compress.allocation.fit import Fit
from compress.errors import RecipeError
from compress.events import Event
from compress.quantization.scheme import label_of
from compress.stages.base import StageContext, StageOutcome
from compress.stages.choices import HALVINGS, Choice, Choices
from compress.training.clock import Clock

if TYPE_CHECKING:
    from compress.stages.mixed_precision import MixedPrecision

SPREAD_OF_PROBES = 1.0
"""Standard deviation of the logarithm by which costs are disturbed for choices that the fit is made from."""
SPREAD_OF_PROPOSALS = 0.3
"""The same, for proposals."""
UNIFORM_MEASURED = 3
"""Uniform choices within the budget that are measured: the largest."""


@dataclass(frozen=True)
class _Found:
    """What was measured, and what became of it: the plan, its rivals, the first and the fitted choice, the fit."""

    chosen: Choice
    uniform: list[Choice]
    first: Choice
    fitted: Choice
    fit: Fit
    costs: list[list[float]]


class Run:
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

    def keep_uniform(self, message: str, **values: float) -> None:
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


class WithinBudget(Run):
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
        self.keep_uniform(message, uniform=of_uniform, mixed=of_mixed)
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
            # A fit to a few choices may lead away from the best one.
            better = choices.judge(fitted).kl <= choices.judge(first).kl
            for number in range(stage.proposals):
                mixed.append(self.disturbed(costs if better else choices.costs, SPREAD_OF_PROPOSALS, limit))
                choices.judge(mixed[-1])
                advance(f"proposal {number + 1}/{stage.proposals}")
        return mixed, fitted, found, costs


class FirstPass(Run):
    """The fewest bytes whose divergence stays within the bounds.

    1. `probes` mixtures at budgets evenly apart are measured, and costs are fitted to them as with a budget.
    2. The smallest mixture by fitted costs within the bounds is found by bisection between those.
    3. Proposals: disturbed costs, solved within a byte less; one that is within the bounds is the new smallest.
    4. The smallest uniform choice within the bounds, also by bisection, has to be larger, or it is the plan.
    """

    def within(self, choice: Choice) -> bool:
        judged = self.choices.judge(choice)
        return self.bounds.hold(judged.kl, judged.lost, self.stage.share_of_bounds)

    @property
    def bounds(self) -> Bounds:
        assert self.stage.bounds is not None, "a recipe's bounds are filled in when it is read"
        return self.stage.bounds

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
            for number in range(stage.proposals):
                if best is not None and choices.size(best) > least:
                    smaller = self.disturbed(costs, SPREAD_OF_PROPOSALS, choices.size(best) - 1)
                    best = smaller if self.within(smaller) else best
                advance(f"proposal {number + 1}/{stage.proposals}")
            plain, uniform = self._smallest_uniform()
        if best is None and plain is None:
            raise RecipeError(self._nothing_within([*mixed, *uniform]))
        if best is None or (plain is not None and choices.size(plain) <= choices.size(best)):
            assert plain is not None
            sizes = {"uniform": choices.size(plain), **({"mixed": choices.size(best)} if best else {})}
            message = (
                f"{choices.label(plain)} everywhere stays within the bounds in {sizes['uniform']:,} bytes, and no "
                "mixture that was measured does in fewer: the plan is uniform"
            )
            self.keep_uniform(message, **sizes)
            best = plain
        return _Found(best, uniform, first, fitted, found, costs)

    def _nothing_within(self, measured: list[Choice]) -> str:
        stage = self.stage
        judged = min(map(self.choices.judge, measured), key=lambda each: each.kl)
        return (
            f"mixed_precision: nothing measured stays within {stage.share_of_bounds:g} of {self.bounds.words} on "
            f"the tuning windows; the closest has a mean KL of {judged.kl:.4g} and {judged.perplexity_ratio:.4g} "
            f"times the perplexity. Give candidates with more bits{', a larger budget' if stage.budget else ''}, "
            "wider gates or bounds, or a larger share_of_bounds."
        )

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
