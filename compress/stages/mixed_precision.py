"""Which linear gets how many bits, within a budget: a precision plan that stages with `bits: planned` follow.

`choosing` finds it; here are the fields, and what `plan` can say before anything is known of the model. Tuning windows
are calibration windows that no candidate was computed from. Units are linears, or what a runtime fuses.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from compress.allocation.bounds import Bounds
from compress.allocation.budget import Budget, Sizes
from compress.allocation.solver import BudgetError, cheapest
from compress.allocation.units import Unit
from compress.errors import RecipeError
from compress.quantization.scheme import Option, Scheme
from compress.stages.base import Shapes, StageContext, StageOutcome
from compress.stages.candidates import CandidateStage
from compress.stages.choices import HALVINGS
from compress.stages.choosing import FirstPass, WithinBudget


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
        if self.stop == "budget" and (self.bounds is not None or "share_of_bounds" in self.changed_fields):
            raise ValueError("bounds and share_of_bounds belong to stop: first_pass")
        return self

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
        run = FirstPass if self.stop == "first_pass" else WithinBudget
        return run(self, context).outcome()


def _as_if_alike(option: Option, shape: tuple[int, int]) -> float:
    """The cost of rounding a matrix (rows, columns) if an error of a weight cost the same everywhere, in any unit."""
    if option is None:
        return 0.0
    return math.prod(shape) * 4.0**-option.bits * (1 + 4 / option.width(shape[1]))
