"""A bound on the ratio of one measurement to the same measurement of the source model."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from compress.gates.base import Facts, Gate, Judgement, bounds_text, number_text, verdict_on


class RelativeGate(Gate):
    """A bound on compressed / source for one measurement."""

    kind: Literal["relative"] = "relative"
    measure: str = Field(description="a measurement that source and compressed model both have, e.g. perplexity.<set>")
    max_ratio: float | None = Field(default=None, gt=0)
    min_ratio: float | None = Field(default=None, gt=0)
    use_interval: bool = Field(
        default=False,
        description="judge the 95 % interval of the ratio, paired by window: passed if all of it is within the bound, "
        "failed if none of it, otherwise inconclusive",
    )

    @model_validator(mode="after")
    def _bounded(self) -> RelativeGate:
        if self.max_ratio is None and self.min_ratio is None:
            raise ValueError("give max_ratio, min_ratio or both: a gate without a bound judges nothing")
        if self.max_ratio is not None and self.min_ratio is not None and self.min_ratio > self.max_ratio:
            raise ValueError(f"min_ratio {self.min_ratio:g} is above max_ratio {self.max_ratio:g}: no value passes")
        return self

    @property
    def measures(self) -> list[str]:
        return [self.measure]

    def judge(self, facts: Facts) -> Judgement:
        limit = bounds_text(self.measure, self.min_ratio, self.max_ratio, " x source")
        value, base = facts.compressed.get(self.measure), facts.source.get(self.measure)
        if value is None or base is None or base == 0:
            which = "the compressed model" if value is None else "the source"
            sentence = f"{self.measure} was not measured on {which}, so the gate fails."
            return Judgement(self.kind, self.measure, None, None, limit, "failed", sentence)
        ratio = value / base
        interval = facts.ratio_intervals.get(self.measure)
        verdict = verdict_on(ratio, interval if self.use_interval else None, self.min_ratio, self.max_ratio)
        sentence = (
            f"{self.measure} is {number_text(self.measure, value)} against {number_text(self.measure, base)}, "
            f"{ratio:.4g} x source; the bound is {limit}"
        )
        if self.use_interval and interval:
            sentence += f", the 95 % interval {interval[0]:.4g} to {interval[1]:.4g}"
        return Judgement(self.kind, self.measure, ratio, interval, limit, verdict, f"{sentence}: {verdict}.")
