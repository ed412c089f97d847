"""Gates as a picture: for each, what was observed, its interval, and where the bound lies.

    |=========== allowed ===========|······ beyond ······
         |----o----|                ^ limit

Gates bound different things, so each has an axis of its own; positions can be compared within a row only.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from markupsafe import Markup

from compress.reports.report import GateResult, Report
from compress.reports.tables import observed_text

WIDTH, HEIGHT, EDGE = 460, 54, 6
TRACK_TOP, TRACK_HEIGHT = 18, 16
_BOUND = re.compile(r"(<=|>=) (-?[\d,]*\.?\d+(?:e[+-]?\d+)?)( %| points)?")
_LETTER = 6.0
"""Width of a letter of a label, roughly, in units of the view box."""


@dataclass(frozen=True)
class Strip:
    """One gate: its row in words, and its picture; None where there is no number to draw."""

    measure: str
    verdict: str
    tier: str
    picture: Markup | None


def strips(report: Report) -> list[Strip]:
    """A row for each gate, in the order judged."""
    return [Strip(gate.measure, gate.verdict, gate.tier, strip(gate)) for gate in report.gates]


def bounds(gate: GateResult) -> tuple[float | None, float | None]:
    """(least, most) allowed, in the unit of `observed`, read from the limit's words: `>= 0.9 and <= 1.1 x source`.

    A size gate may name several measures; the part that was judged counts: the one that was missed, else the first.
    """
    low = high = None
    for part in _parts(gate):
        for sign, number, unit in _BOUND.findall(part):
            value = float(number.replace(",", "")) / (100 if unit else 1)
            low, high = (value, high) if sign == ">=" else (low, value)
    return low, high


def _parts(gate: GateResult) -> list[str]:
    parts = gate.limit.split(" and ")
    named = [part for part in parts if part.startswith(gate.measure)]
    if not named:
        return parts
    missed = [part for part in named if gate.observed is not None and gate.observed > _most(part)]
    return (missed if gate.verdict == "failed" and missed else named)[:1]


def _most(part: str) -> float:
    return min((float(number.replace(",", "")) for _, number, _ in _BOUND.findall(part)), default=math.inf)


def strip(gate: GateResult) -> Markup | None:
    """The picture of one gate; None if nothing was observed or no bound can be drawn."""
    low, high = bounds(gate)
    ends = [value for value in (low, high) if value is not None and math.isfinite(value)]
    if gate.observed is None or not math.isfinite(gate.observed) or not ends:
        return None
    if gate.verdict == "passed" and not within(gate.observed, low, high):
        return None  # the limit is in another unit than what was observed
    interval = gate.interval if gate.interval and all(map(math.isfinite, gate.interval)) else None
    values = [gate.observed, *ends, *(interval or ())]
    left, right = min(values), max(values)
    margin = 0.18 * (right - left) or 0.5 * abs(right) or 1.0
    left, right = left - margin, right + margin

    def x(value: float) -> float:
        share: float = (value - left) / (right - left)
        return round(EDGE + (WIDTH - 2 * EDGE) * share, 1)

    allowed = (x(left if low is None else low), x(right if high is None else high))
    shapes = [
        _box("beyond", EDGE, WIDTH - EDGE, f"beyond the bound {gate.limit}"),
        _box("allowed", *allowed, f"within the bound {gate.limit}"),
    ]
    for end in ends:
        shapes.append(_limit(x(end), observed_text(gate, end)))
    if interval:
        shapes.append(_interval(x(interval[0]), x(interval[1]), gate))
    shapes.append(_observed(x(gate.observed), gate))
    label = f"{gate.measure}: observed {observed_text(gate, gate.observed)}, bound {gate.limit}, {gate.verdict}"
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, HEIGHT, label, Markup("").join(shapes)
    )


def within(value: float, low: float | None, high: float | None) -> bool:
    """low <= value <= high, missing bounds open, up to the six digits that the limit's words have."""
    slack = 1e-5 * max(abs(value), 1e-12)
    return (low is None or value >= low - slack) and (high is None or value <= high + slack)


def _box(style: str, start: float, end: float, title: str) -> Markup:
    return Markup('<rect class="{}" x="{}" y="{}" width="{}" height="{}"><title>{}</title></rect>').format(
        style, start, TRACK_TOP, round(max(0.0, end - start), 1), TRACK_HEIGHT, title
    )


def _limit(x: float, text: str) -> Markup:
    return Markup('<line class="limit" x1="{}" x2="{}" y1="{}" y2="{}"/>{}').format(
        x, x, TRACK_TOP - 2, TRACK_TOP + TRACK_HEIGHT + 4, _label(x, HEIGHT - 6, text, "tick")
    )


def _interval(start: float, end: float, gate: GateResult) -> Markup:
    y = TRACK_TOP + TRACK_HEIGHT / 2
    words = " to ".join(observed_text(gate, value) for value in gate.interval or ())
    return Markup('<line class="interval" x1="{}" x2="{}" y1="{}" y2="{}"><title>interval {}</title></line>').format(
        start, max(end, start + 0.1), y, y, words
    )


def _observed(x: float, gate: GateResult) -> Markup:
    words = observed_text(gate, gate.observed)
    return Markup('<circle class="mark {}" cx="{}" cy="{}" r="5"><title>observed {}</title></circle>{}').format(
        gate.verdict, x, TRACK_TOP + TRACK_HEIGHT / 2, words, _label(x, TRACK_TOP - 6, words, "value")
    )


def _label(x: float, y: float, text: str, style: str) -> Markup:
    """A label centred on `x`, moved where it would leave the picture."""
    half = len(text) * _LETTER / 2
    at = min(max(x, half), WIDTH - half)
    return Markup('<text class="{}" x="{}" y="{}" text-anchor="middle">{}</text>').format(style, round(at, 1), y, text)
