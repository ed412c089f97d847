"""A bound on time: seconds, or how much slower than the source, with the wandering of clocks in view."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, model_validator

from compress.gates.base import Facts, Gate, Interval, Judgement, verdict_on


class LatencyGate(Gate):
    """A bound on the seconds of prefill or of a decoded token, as an evaluation of kind latency measures them. Judged by their 95 % interval: passed if all of it is within the bound, failed if none of it, otherwise inconclusive."""  # noqa: E501

    kind: Literal["latency"] = "latency"
    what: Literal["prefill", "decode"] = Field(
        default="decode", description="prefill: reading the prompt; decode: a token"
    )
    max_seconds: float | None = Field(default=None, gt=0, description="most seconds of the compressed model")
    max_ratio: float | None = Field(
        default=None, gt=0, description="most seconds in relation to the source's, turn by turn"
    )

    @model_validator(mode="after")
    def _bounded(self) -> LatencyGate:
        if (self.max_seconds is None) == (self.max_ratio is None):
            raise ValueError("give either max_seconds or max_ratio")
        return self

    @property
    def measures(self) -> list[str]:
        return [f"latency.{self.what}_seconds"]

    def judge(self, facts: Facts) -> Judgement:
        (measure,) = self.measures
        suffix = " x source" if self.max_ratio is not None else " s"
        most = self.max_ratio if self.max_ratio is not None else self.max_seconds
        limit = f"<= {most:g}{suffix}"
        interval = (facts.ratio_intervals if self.max_ratio is not None else facts.intervals).get(measure)
        if interval is None:
            sentence = f"{measure} was not measured, so the gate fails."
            return Judgement(self.kind, measure, None, None, limit, "failed", sentence)
        observed = _middle(interval)
        verdict = verdict_on(observed, interval, None, most)
        sentence = (
            f"{measure} is {observed:.4g}{suffix} (95 % interval {interval[0]:.4g} to {interval[1]:.4g}); the bound is "
            f"{limit}: {verdict}."
        )
        return Judgement(self.kind, measure, observed, interval, limit, verdict, sentence)


def _middle(interval: Interval) -> float:
    """The geometric mean of the turns, from which the interval was made."""
    return math.sqrt(interval[0] * interval[1])
