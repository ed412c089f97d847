"""What the non-inferiority gates of a recipe can decide, before anything is spent.

A gate resolves a margin m if a model that lost nothing passes it with probability 0.8 or more:
P(z(m) < -z_alpha) = Phi(m / s - z_alpha), with s the standard error of the loss. It follows that the smallest margin
that can be resolved is (z_alpha + z_0.8) s; a true loss that far beyond the margin fails with the same probability.
s is assumed, and the assumption is printed:

items     one in ten changes sides: s = sqrt(0.10 / n), and because counts are whole and the test exact (`discordance`),
          1.25 / n is taken off the margin: simulated, the margin then said to be resolved is passed in 78 to 87 % of
          cases from 10 to 200 items
windows   a token's loss moves as in a model of mean KL 0.05: a variance of 2 KL to first order, so that
          s = sqrt(2 x 0.05 / (windows x tokens))

A bound on mean KL is another question: a model without loss has none and passes. There it is how near to the margin a
model may come: with window means that differ by a share v of their mean, and u windows, mean KL up to
margin / (1 + (z_alpha + z_0.8) v / sqrt(u)) passes with probability 0.8.

Where a recipe lets a gate ask for more, it is what can be decided at the last look, with the alpha of one look.

Example: 200 items, alpha 0.05: s = 0.0224, so margins from (1.645 + 0.842) x 0.0224 + 0.006 = 0.062 up are resolved.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from scipy import stats

from compress.evaluation.looks import alpha_at_each, look_sizes
from compress.evaluation.tasks.items import draw
from compress.gates import NonInferiorityGate
from compress.recipe import Recipe

DISCORDANCE = 0.10
WHOLE_COUNTS = 1.25
"""Items by which an exact test of whole counts falls short of a normal one."""
KL = 0.05
KL_SPREAD = 0.3
"""Standard deviation of window means over their mean. Within one kind of text 0.21 was measured
(docs/benchmarks/instrument.md); mixed texts differ more."""
WANTED = 0.8


@dataclass(frozen=True)
class Power:
    """Of one gate. `margin` and `smallest_margin` are in the gate's unit."""

    measure: str
    margin: float
    units: str
    assumption: str
    power: float
    """Probability that a model which lost nothing passes; of half the margin, for mean KL."""
    smallest_margin: float | None = None
    """That is resolved with a power of 0.8; None for mean KL."""
    largest_passing: float | None = None
    """For mean KL: the largest that passes with a probability of 0.8."""

    @property
    def sentence(self) -> str:
        if self.largest_passing is not None:
            return (
                f"{self.measure}: {self.units} pass a model up to {self.largest_passing:.3g} nats with probability "
                f"{WANTED:g} at margin {self.margin:g} (assumed: {self.assumption})"
            )
        return (
            f"{self.measure}: {self.units} pass a model that lost nothing with probability {self.power:.2f} at margin "
            f"{self.margin:g}; they resolve margins from {self.smallest_margin:.3g} up (assumed: {self.assumption})"
        )

    @property
    def suffices(self) -> bool:
        return self.power >= WANTED


def powers(recipe: Recipe) -> list[Power]:
    """Of every non-inferiority gate whose number of units is known."""
    found = [_power(recipe, gate) for gate in recipe.gates if isinstance(gate, NonInferiorityGate)]
    return [each for each in found if each is not None]


def _power(recipe: Recipe, gate: NonInferiorityGate) -> Power | None:
    kind, _, rest = gate.measure.partition(".")
    if kind == "task":
        sizes = _items(recipe, rest.rpartition(".")[0])
        if sizes is None:
            return None
        assumption = f"{DISCORDANCE:.0%} of items change sides"
        return _resolved(gate, f"{_counted(sizes)} items", sizes, DISCORDANCE, assumption)
    name = rest if kind == "perplexity" else rest.rpartition(".")[0]
    specs = [spec for spec in recipe.on_text if spec.kind == kind and spec.set_name == name]
    if not specs:
        return None
    sizes, tokens = specs[0].looks, specs[0].window_tokens
    units = f"{_counted(sizes)} windows of {tokens} tokens"
    if kind == "divergence":
        return _divergence(gate, units, sizes)
    return _resolved(gate, units, sizes, 2 * KL / tokens, f"mean KL {KL:g} nats a token")


def _counted(sizes: tuple[int, ...]) -> str:
    return f"{sizes[-1]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"


def _items(recipe: Recipe, label: str) -> tuple[int, ...] | None:
    """Items of a task at each look, if it has as many; None for all of one of lm-eval's own, whose number is not known
    yet."""
    spec = next((spec for spec in recipe.tasks if spec.label == label), None)
    if spec is None:
        return None
    if spec.file is None:
        return None if spec.items is None else look_sizes(spec.items, spec.max_items or spec.items)
    count = len(draw(spec, recipe.seed)[0].asked)
    return look_sizes(spec.items or count, count)


def _divergence(gate: NonInferiorityGate, units: str, sizes: tuple[int, ...]) -> Power:
    """Of a bound on mean KL, by how much windows usually differ."""
    spread = KL_SPREAD / math.sqrt(sizes[-1])
    reach = float(stats.norm.isf(alpha_at_each(gate.alpha, sizes)))
    return Power(
        measure=gate.measure,
        margin=gate.margin,
        units=units,
        assumption=f"window means differ by {KL_SPREAD:.0%} of their mean",
        power=float(stats.norm.cdf(1 / spread - reach)),
        largest_passing=gate.margin / (1 + (reach + float(stats.norm.ppf(WANTED))) * spread),
    )


def _resolved(gate: NonInferiorityGate, units: str, sizes: tuple[int, ...], variance: float, assumption: str) -> Power:
    """variance: of one unit's loss. What can be decided at the last look."""
    error = math.sqrt(variance / sizes[-1])
    reach = float(stats.norm.isf(alpha_at_each(gate.alpha, sizes)))
    is_ratio = gate.measure.startswith("perplexity.")
    short = WHOLE_COUNTS / sizes[-1] if gate.measure.startswith("task.") else 0.0
    margin = (math.log1p(gate.margin) if is_ratio else gate.margin) - short
    smallest = (reach + float(stats.norm.ppf(WANTED))) * error + short
    return Power(
        measure=gate.measure,
        margin=gate.margin,
        units=units,
        assumption=assumption,
        power=float(stats.norm.cdf(margin / error - reach)),
        smallest_margin=math.expm1(smallest) if is_ratio else smallest,
    )
