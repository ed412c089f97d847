"""What `stop: first_pass` looks for: the gates of a recipe, as bounds that text without a gate on it can be held to."""

from __future__ import annotations

from collections.abc import Iterable

from compress.allocation.bounds import Bounds
from compress.gates import AnyGate, NonInferiorityGate, RelativeGate, ThresholdGate
from compress.recipe.model import Recipe
from compress.stages.mixed_precision import MixedPrecision


def with_bounds(recipe: Recipe) -> Recipe:
    """The recipe with bounds written out in stages that stop at the first pass, so that a stored one says them."""
    bounds = bounds_of(recipe.gates)
    stages = tuple(
        stage.model_copy(update={"bounds": bounds})
        if isinstance(stage, MixedPrecision) and stage.needs_bounds
        else stage
        for stage in recipe.stages
    )
    return recipe.model_copy(update={"stages": stages})


def bounds_of(gates: Iterable[AnyGate]) -> Bounds | None:
    """The tightest bounds on mean KL and on perplexity that gates set which decide; None where none sets one."""
    kl: list[float] = []
    ratios: list[float] = []
    for gate in gates:
        if gate.tier == "advisory":
            continue
        if isinstance(gate, ThresholdGate) and _is_mean_kl(gate.measure) and gate.max is not None:
            kl.append(gate.max)
        elif isinstance(gate, RelativeGate) and gate.measure.startswith("perplexity.") and gate.max_ratio is not None:
            ratios.append(gate.max_ratio)
        elif isinstance(gate, NonInferiorityGate) and _is_mean_kl(gate.measure):
            kl.append(gate.margin)
        elif isinstance(gate, NonInferiorityGate) and gate.measure.startswith("perplexity."):
            ratios.append(1 + gate.margin)
    if not kl and not ratios:
        return None
    return Bounds(max_kl=min(kl, default=None), max_perplexity_ratio=min(ratios, default=None))


def _is_mean_kl(measure: str) -> bool:
    return measure.startswith("divergence.") and measure.endswith(".mean_kl")
