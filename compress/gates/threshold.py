"""An absolute bound on one measurement of the compressed model."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from compress.gates.base import Facts, Gate, Judgement, bounds_text, number_text, verdict_on


class ThresholdGate(Gate):
    """An absolute bound on a measurement of the compressed model."""

    kind: Literal["threshold"] = "threshold"
    measure: str = Field(description="e.g. divergence.<set>.mean_kl, perplexity.<set>, weight_bytes, effective_bits")
    max: float | None = None
    min: float | None = None
    use_interval: bool = Field(
        default=False,
        description="judge the 95 % interval: passed if all of it is within the bound, failed if none of it, "
        "otherwise inconclusive",
    )

    @model_validator(mode="after")
    def _bounded(self) -> ThresholdGate:
        if self.max is None and self.min is None:
            raise ValueError("give max, min or both: a gate without a bound judges nothing")
        if self.max is not None and self.min is not None and self.min > self.max:
            raise ValueError(f"min {self.min:g} is above max {self.max:g}: no value passes")
        return self

    @property
    def measures(self) -> list[str]:
        return [self.measure]

    def judge(self, facts: Facts) -> Judgement:
        limit = bounds_text(self.measure, self.min, self.max)
        value = facts.compressed.get(self.measure)
        if value is None:
            sentence = f"{self.measure} was not measured, so the gate fails."
            return Judgement(self.kind, self.measure, None, None, limit, "failed", sentence)
        interval = facts.intervals.get(self.measure)
        verdict = verdict_on(value, interval if self.use_interval else None, self.min, self.max)
        sentence = f"{self.measure} is {number_text(self.measure, value)}; the bound is {limit}: {verdict}."
        if self.use_interval and interval:
            sentence = (
                f"{self.measure} is {value:.6g} (95 % interval {interval[0]:.6g} to {interval[1]:.6g}); "
                f"the bound is {limit}: {verdict}."
            )
        return Judgement(self.kind, self.measure, value, interval, limit, verdict, sentence)
