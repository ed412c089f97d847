"""Quality against bytes for a range of budgets, on the tuning windows of a recipe's mixed_precision stage.

The sensitivity stage is applied as in a run and found finished by the next run or frontier. Then, for each budget, the
cheapest mixture and the one by fitted costs are put together from the candidates and measured, and so is every
uniform candidate (beside a vocabulary's candidates those that are predicted to lead). Nothing of the recipe's
evaluation or gates is read: what a frontier shows may be used to choose.
Points are the candidates as they were solved in isolation; a run solves its choice anew, behind compressed inputs and
with shifted targets, and usually comes out lower.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from compress.allocation.solver import BudgetError
from compress.checkpoints.sources import cache_folder
from compress.checkpoints.working import WorkingCheckpoint
from compress.errors import RecipeError
from compress.events import Progress
from compress.files import A_CACHE, disk_errors
from compress.memory.measure import PeakSampler
from compress.recipe import Recipe
from compress.stages.base import StageContext
from compress.stages.choices import HALVINGS, Choice, Choices
from compress.stages.mixed_precision import MixedPrecision
from compress.steps.fold import fold
from compress.steps.plan import Plan
from compress.steps.source import open_source
from compress.steps.texts import read_calibration


@dataclass(frozen=True)
class Point:
    """A choice: `scheme` is None for a mixture. Bytes of linears, and of all tensors of the export."""

    scheme: str | None
    effective_bits: float
    linear_bytes: int
    weight_bytes: int
    kl: float
    perplexity_ratio: float
    within_bound: bool | None = None
    """Whether its KL is within the bound that was asked for."""

    def to_json(self) -> dict[str, Any]:
        return {**self.__dict__}


@dataclass(frozen=True)
class Frontier:
    """Points by size, the smallest first; `smallest` is the smallest mixture within the bound."""

    name: str
    tuning_tokens: int
    points: tuple[Point, ...]
    r2: float | None
    rank: float | None
    max_kl: float | None
    smallest: Point | None

    def to_json(self) -> dict[str, Any]:
        smallest = self.smallest.to_json() if self.smallest else None
        return {**self.__dict__, "points": [point.to_json() for point in self.points], "smallest": smallest}


def frontier(
    planned: Plan, bits: Sequence[float] | None, count: int, max_kl: float | None, progress: Progress
) -> Frontier:
    """Measure `count` budgets between the smallest and the largest candidate, or those in `bits` (effective bits).

    With `max_kl`, also look for the smallest budget whose mixture stays within it. Raises RecipeError for a recipe
    without a mixed_precision stage and for budgets that nothing fits.
    """
    recipe = planned.recipe
    at = next((index for index, each in enumerate(recipe.stages) if isinstance(each, MixedPrecision)), None)
    if at is None:
        raise RecipeError("a frontier needs a mixed_precision stage, whose candidates it mixes; the recipe has none")
    stage = recipe.stages[at]
    assert isinstance(stage, MixedPrecision)
    choices = _choices(recipe, planned, at, stage, progress)
    budgets = list(bits) if bits else _spread(choices, count)
    uniform = choices.uniforms()
    with progress.task("frontier", len(uniform) + 2 * len(budgets)) as advance:
        for choice in uniform:
            choices.judge(choice)
            advance("uniform")
        raw = [_solved(choices, choices.costs, budget) for budget in budgets]
        for choice in raw:
            choices.judge(choice)
            advance("mixtures")
        found = choices.fit([*uniform, *raw])
        costs = choices.fitted_costs(found)
        mixed = []
        for budget, choice in zip(budgets, raw, strict=True):
            mixed.append(min(choice, _solved(choices, costs, budget), key=lambda each: choices.judge(each).kl))
            advance("mixtures by fitted costs")
    smallest = None if max_kl is None else _smallest(choices, costs, mixed, max_kl, progress)
    chosen = [*uniform, *mixed, *([smallest] if smallest else [])]
    everything = {_point(choices, choice, max_kl, choice in uniform) for choice in chosen}
    return Frontier(
        recipe.name,
        choices.tuning.tokens,
        tuple(sorted(everything, key=lambda point: (point.linear_bytes, point.kl))),
        found.r2,
        found.rank,
        max_kl,
        _point(choices, smallest, max_kl, smallest in uniform) if smallest else None,
    )


def _choices(recipe: Recipe, planned: Plan, at: int, stage: MixedPrecision, progress: Progress) -> Choices:
    """Everything up to the candidates, as a run does it."""
    machine = planned.machine
    with PeakSampler() as sampler, disk_errors(cache_folder(), A_CACHE):
        source = open_source(recipe.model, progress)
        windows = read_calibration(recipe, source, machine, progress)
        before = recipe.stages[:at]
        folded = fold(
            before, source.checkpoint, source.digest, windows, recipe.seed, machine, planned.stored, progress, sampler
        )
    folder = cache_folder() / "frontiers" / folded[-1].fingerprint[:32]
    context = StageContext(
        origin=source.checkpoint,
        source=folded[-1].checkpoint,
        output=WorkingCheckpoint(folder),
        windows=windows,
        device=machine.device,
        compute=machine.compute,
        stored=planned.stored,
        tokens_at_once=machine.tokens_at_once,
        seed=recipe.seed,
        progress=progress,
    )
    return Choices(stage, context, folder / "measured.json")


def _spread(choices: Choices, count: int) -> list[float]:
    """Budgets evenly apart, from a little above the smallest choice to that of the largest."""
    low, high = (8 * sum(pick(row) for row in choices.bytes) / choices.sizes.weights for pick in (min, max))
    return [low + (high - low) * step / count for step in range(1, count + 1)]


def _solved(choices: Choices, costs: list[list[float]], bits: float) -> Choice:
    try:
        return choices.cheapest(costs, math.floor(bits * choices.sizes.weights / 8))
    except BudgetError as error:
        least = math.ceil(8e4 * error.smallest / choices.sizes.weights) / 1e4
        raise RecipeError(f"--bits {bits:g}: the smallest mixture of the candidates takes {least:g}") from None


def _smallest(
    choices: Choices, costs: list[list[float]], mixed: list[Choice], max_kl: float, progress: Progress
) -> Choice | None:
    """The smallest mixture found whose KL is at most `max_kl`."""
    with progress.task("smallest within the bound", HALVINGS) as advance:
        return choices.smallest(costs, mixed, lambda choice: choices.judge(choice).kl <= max_kl, advance)


def _point(choices: Choices, choice: Choice, max_kl: float | None, is_uniform: bool) -> Point:
    judged, size = choices.judge(choice), choices.size(choice)
    return Point(
        scheme=choices.label(choice) if is_uniform else None,
        effective_bits=choices.effective_bits(choice),
        linear_bytes=size,
        weight_bytes=size + choices.sizes.other_bytes,
        kl=judged.kl,
        perplexity_ratio=judged.perplexity_ratio,
        within_bound=None if max_kl is None else judged.kl <= max_kl,
    )
