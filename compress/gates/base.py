"""What every gate is: a frozen config, and `judge`, which turns facts into a judgement."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from compress.evaluation.paired import Paired

Verdict = Literal["passed", "failed", "inconclusive"]
Tier = Literal["critical", "supporting", "advisory"]
Interval = tuple[float, float]


@dataclass(frozen=True)
class Look:
    """Which look at a set or task this is, counted from 1, and the units at every look that there can be."""

    number: int
    sizes: tuple[int, ...]

    @property
    def is_last(self) -> bool:
        return self.number == len(self.sizes)


@dataclass(frozen=True)
class Facts:
    """Everything a gate may look at: flat measurements, 95 % intervals, event counts by kind."""

    source: dict[str, float]
    compressed: dict[str, float]
    intervals: dict[str, Interval] = field(default_factory=dict)
    ratio_intervals: dict[str, Interval] = field(default_factory=dict)
    event_counts: dict[str, int] = field(default_factory=dict)
    paired: dict[str, Paired] = field(default_factory=dict)
    looks: dict[str, Look] = field(default_factory=dict)
    """By measurement, where more may be asked for than has been."""
    source_bytes: float | None = None
    """Tensor bytes of the recipe's source, also where something else is compared with."""


@dataclass(frozen=True)
class Judgement:
    """One gate's verdict, with the number it judged and a sentence a reviewer can quote."""

    kind: str
    measure: str
    observed: float | None
    interval: Interval | None
    limit: str
    verdict: Verdict
    sentence: str
    tier: Tier = "critical"
    units: int | None = None
    """Items or windows that decided, where the gate is a test."""
    p_within: float | None = None
    """Small where the loss is surely below the margin, where the gate is a test."""
    p_beyond: float | None = None
    """Small where it is surely above."""
    alpha: float | None = None


class Gate(BaseModel):
    """Base of all gate configs."""

    # An infinite bound is a gate that cannot fail.
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    tier: Tier = Field(
        default="critical",
        description="critical: decides; supporting: its failure makes the verdict inconclusive; advisory: only informs",
    )

    @property
    def measures(self) -> list[str]:
        """Measurements the gate looks at, so that a recipe can be checked before work starts."""
        return []

    def judge(self, facts: Facts) -> Judgement:
        raise NotImplementedError


def within(value: float, low: float | None, high: float | None) -> bool:
    """low <= value <= high, missing bounds open. NaN is never within."""
    return value == value and (low is None or value >= low) and (high is None or value <= high)


def verdict_on(value: float, interval: Interval | None, low: float | None, high: float | None) -> Verdict:
    """Point verdict without an interval. With one: passed if all of it is within the bounds, failed if none of it."""
    if interval is None or not math.isfinite(value):
        return "passed" if within(value, low, high) else "failed"
    inside = [within(end, low, high) for end in interval]
    if all(inside):
        return "passed"
    outside = (high is not None and interval[0] > high) or (low is not None and interval[1] < low)
    return "failed" if outside else "inconclusive"


def number_text(measure: str, value: float) -> str:
    """A measurement as a sentence has it: bytes with separators, everything else with six digits."""
    return f"{value:,.0f}" if measure.endswith("bytes") else f"{value:.6g}"


def _bound(measure: str, value: float, suffix: str) -> str:
    return f"{value:g}" if suffix else number_text(measure, value)


def bounds_text(measure: str, low: float | None, high: float | None, suffix: str = "") -> str:
    """'<= 0.1', '>= 0.9', or both; bytes with separators, if it is them and not a ratio of them."""
    parts = [] if low is None else [f">= {_bound(measure, low, suffix)}{suffix}"]
    parts += [] if high is None else [f"<= {_bound(measure, high, suffix)}{suffix}"]
    return " and ".join(parts)
