"""Not worse than the source by more than a margin, decided with the noise of the measurement in view.

`perplexity 1.04 x source` on 24 windows, or two points of accuracy on 200 items, may be chance either way. This gate
passes only where the loss is surely below the margin, fails only where it is surely above, and otherwise says that it
cannot tell. "Surely" is one-sided, at 1 - alpha.
"""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, field_validator, model_validator

from compress.evaluation.difference import Comparison, compare
from compress.evaluation.discordance import flips
from compress.evaluation.looks import alpha_at_each
from compress.evaluation.paired import Paired
from compress.gates.base import Facts, Gate, Interval, Judgement, Look, Verdict


class NonInferiorityGate(Gate):
    """The compressed model is not worse than the source by more than a margin, with confidence 1 - alpha; inconclusive where the data cannot tell."""  # noqa: E501

    kind: Literal["non_inferiority"] = "non_inferiority"
    measure: str = Field(
        description="task.<name>.accuracy or accuracy_norm, perplexity.<set> or divergence.<set>.mean_kl"
    )
    margin: float = Field(
        description="largest acceptable loss: of accuracy as a difference (0.02 is two points), of perplexity as a "
        "ratio (0.05 is 5 %), of mean KL in nats"
    )
    alpha: float = Field(default=0.05, ge=0.001, lt=0.5, description="chance of passing a model that is at the margin")

    @field_validator("margin")
    @classmethod
    def _positive(cls, value: float) -> float:
        if not value > 0:
            raise ValueError(f"{value:g}: a margin must be above 0; that nothing at all was lost no data can show")
        return value

    @model_validator(mode="after")
    def _can_fail(self) -> NonInferiorityGate:
        if self.measure.startswith("task.") and self.margin >= 1:
            raise ValueError(f"margin {self.margin:g} of an accuracy: every model meets it; 0.02 is two points")
        return self

    @property
    def measures(self) -> list[str]:
        return [self.measure]

    def judge(self, facts: Facts) -> Judgement:
        paired = facts.paired.get(self.measure)
        if paired is None or len(paired) < (1 if paired.unit == "items" else 2):
            return self._not_measured("was not measured on enough items or windows of both models")
        look = facts.looks.get(self.measure, Look(1, (len(paired),)))
        alpha = alpha_at_each(self.alpha, look.sizes)
        found = compare(paired, self._margin_of_scores(), alpha)
        if not math.isfinite(found.loss):
            return self._not_measured("is not a finite number")
        low, high = self._shown(found.low), self._shown(found.high)
        verdict = _verdict(found, alpha)
        nothing_to_lose = paired.unit == "items" and verdict == "passed" and float(paired.source.mean()) <= self.margin
        if nothing_to_lose:
            verdict = "inconclusive"
        return Judgement(
            kind=self.kind,
            measure=self.measure,
            observed=self._shown(found.loss),
            interval=(low, high),
            limit=self._limit(),
            verdict=verdict,
            sentence=self._sentence(paired, found, (low, high), verdict, alpha)
            + (_hardly_any_right(paired) if nothing_to_lose else "")
            + _which_look(look, alpha),
            units=found.units,
            p_within=found.p_within,
            p_beyond=found.p_beyond,
            alpha=alpha,
        )

    def _margin_of_scores(self) -> float:
        """The margin in the unit of the scores: a ratio of perplexities is a difference of mean losses."""
        return math.log1p(self.margin) if self._is_ratio else self.margin

    def _shown(self, loss: float) -> float:
        """A loss in the unit of the margin."""
        return math.expm1(min(loss, 700.0)) if self._is_ratio else loss

    @property
    def _is_ratio(self) -> bool:
        return self.measure.startswith("perplexity.")

    def _limit(self) -> str:
        if self._is_ratio:
            return f"loss <= {100 * self.margin:g} %"
        if self.measure.startswith("divergence."):
            return f"<= {self.margin:g} nats"
        return f"loss <= {100 * self.margin:g} points"

    def _sentence(self, paired: Paired, found: Comparison, bounds: Interval, verdict: Verdict, alpha: float) -> str:
        scale, unit = (1.0, " nats") if self.measure.startswith("divergence.") else (100.0, " points")
        unit = " %" if self._is_ratio else unit
        low, high = (scale * bound for bound in bounds)
        basis = f"{found.units} {paired.unit}"
        if paired.unit == "items":
            changed = flips(paired)
            basis += f", {changed.lost} lost and {changed.gained} gained"
        what = "is" if self.measure.startswith("divergence.") else "lost"
        return (
            f"{self.measure} {what} {scale * self._shown(found.loss):.4g}{unit} ({100 * (1 - alpha):.4g} % bounds "
            f"{low:.4g} to {high:.4g}; {basis}); the margin is {scale * self.margin:g}{unit}: {verdict}."
        )

    def _not_measured(self, why: str) -> Judgement:
        sentence = f"{self.measure} {why}, so the gate fails."
        return Judgement(self.kind, self.measure, None, None, self._limit(), "failed", sentence)


def _verdict(found: Comparison, alpha: float) -> Verdict:
    if found.p_within < alpha:
        return "passed"
    return "failed" if found.p_beyond < alpha else "inconclusive"


def _hardly_any_right(paired: Paired) -> str:
    share = 100 * float(paired.source.mean())
    return (
        f" The source itself gets {share:.3g} % right, no more than the margin: any model would pass. Give it a floor."
    )


def _which_look(look: Look, alpha: float) -> str:
    """What a reader must know of a gate that may look more than once."""
    if len(look.sizes) == 1:
        return ""
    return f" Look {look.number} of at most {len(look.sizes)}, each at alpha {alpha:g}."
