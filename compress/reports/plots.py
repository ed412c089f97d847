"""A scatter plot as inline SVG: a point for each version, with its interval."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from compress.reports.words import number, size

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 300, 96, 24, 16, 44
_LETTER = 5.8
"""Width of a letter of a label, roughly."""


@dataclass(frozen=True)
class Point:
    """`size` in bytes from left to right, `value` from below upwards; `verdict` decides how it is drawn."""

    size: float
    value: float
    label: str
    verdict: str
    interval: tuple[float, float] | None = None


def scatter(points: Sequence[Point], across: str, upward: str) -> Markup:
    """Values over sizes, on a logarithmic scale where all are above zero. Empty without a point."""
    shown = [point for point in points if math.isfinite(point.size) and math.isfinite(point.value)]
    if not shown:
        return Markup("")
    x, x_ticks = _scale([point.size for point in shown], LEFT + 12, WIDTH - RIGHT - 12, logarithmic=False)
    values = [value for point in shown for value in (point.value, *(point.interval or ())) if math.isfinite(value)]
    logarithmic = min(values) > 0
    y, y_ticks = _scale(values, HEIGHT - BOTTOM - 8, TOP + 8, logarithmic)
    shapes = [
        Markup('<text class="tick" x="{}" y="{}" text-anchor="middle">{}</text>').format(
            x(tick), HEIGHT - BOTTOM + 16, size(tick)
        )
        for tick in x_ticks
    ]
    shapes += [
        Markup(
            '<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>'
            '<text class="tick" x="{}" y="{}" text-anchor="end">{}</text>'
        ).format(LEFT, WIDTH - RIGHT, y(tick), y(tick), LEFT - 6, y(tick) + 3.5, f"{tick:.3g}")
        for tick in y_ticks
    ]
    places = _label_places([(x(point.size), y(point.value), len(point.label) * _LETTER) for point in shown])
    shapes += [_mark(point, x, y, place) for point, place in zip(shown, places, strict=True)]
    words = f"{upward} over {across}{', logarithmic' if logarithmic else ''}"
    return Markup('<svg class="scatter" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, HEIGHT, words, Markup("").join(shapes)
    )


def _scale(
    values: Sequence[float], start: float, end: float, logarithmic: bool
) -> tuple[Callable[[float], float], list[float]]:
    """(place of a value between start and end, four ticks)."""
    low, high = min(values), max(values)
    if low == high:
        low, high = (low / 2, high * 2) if logarithmic else (low - abs(low) / 2 - 1e-9, high + abs(high) / 2 + 1e-9)
    first, last = (math.log(low), math.log(high)) if logarithmic else (low, high)

    def place(value: float) -> float:
        at = math.log(value) if logarithmic else value
        share: float = (at - first) / (last - first)
        return round(start + (end - start) * min(1.0, max(0.0, share)), 1)

    steps = [first + (last - first) * step / 3 for step in range(4)]
    return place, [math.exp(step) if logarithmic else step for step in steps]


_LINE = 12.0
"""Height of a line of labels."""


def _label_places(marks: Sequence[tuple[float, float, float]]) -> list[tuple[float, float, str]]:
    """(x, y, anchor) of each label, for marks at (x, y) with labels of some width: beside its mark, and above or below
    those that stand there already."""
    taken: list[tuple[float, float, float]] = []
    found = []
    for across, up, width in marks:
        to_left = across + 8 + width > WIDTH
        start = across - 8 - width if to_left else across + 8
        offsets = sorted((step * _LINE for step in range(-12, 13)), key=lambda each: (abs(each), each))
        heights = [up - 6 + offset for offset in offsets if TOP <= up - 6 + offset <= HEIGHT - BOTTOM]
        free = next(
            (
                height
                for height in heights
                if all(
                    abs(height - other) >= _LINE or start > right or start + width < left
                    for left, right, other in taken
                )
            ),
            up - 6,
        )
        taken.append((start, start + width, free))
        found.append((across - 8 if to_left else across + 8, round(free, 1), "end" if to_left else "start"))
    return found


def _mark(
    point: Point, x: Callable[[float], float], y: Callable[[float], float], place: tuple[float, float, str]
) -> Markup:
    across, up = x(point.size), y(point.value)
    title = f"{point.label}: {size(point.size)}, {number(point.value)}, {point.verdict}"
    bar = Markup("")
    if point.interval is not None and all(map(math.isfinite, point.interval)):
        bar = Markup('<line class="spread" x1="{0}" x2="{0}" y1="{1}" y2="{2}"/>').format(
            across, y(point.interval[0]), y(point.interval[1])
        )
    text = Markup('<text class="tick" x="{}" y="{}" text-anchor="{}">{}</text>').format(*place, point.label)
    return bar + Markup('<circle class="mark {}" cx="{}" cy="{}" r="5"><title>{}</title></circle>{}').format(
        point.verdict if point.verdict in ("passed", "failed", "inconclusive") else "inconclusive",
        across,
        up,
        title,
        text,
    )
