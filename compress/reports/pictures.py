"""Pictures as inline SVG: no library, no script, colours from the page's own style sheet (light, dark, print).

    block_error_panels   one small plot per kind of linear; error over block, GPTQ beside plain rounding
    time_bar             one bar split into parts

Every shape has a <title>, which a browser shows on hover and a screen reader reads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from compress.reports.report import ModuleRecord
from compress.reports.words import duration, number

WIDTH, HEIGHT = 320, 170
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 22
"""Size of a panel and its margins, in units of the view box."""
PARTS = 6
"""Number of fill colours in the style sheet; later parts of a bar start over."""


@dataclass(frozen=True)
class Axis:
    """A logarithmic axis from `low` to `high`, both > 0, with `ticks` inside."""

    low: float
    high: float
    ticks: tuple[float, ...]

    def y(self, value: float) -> float:
        """Height on the panel; values beyond the axis stay on its edge."""
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return HEIGHT - BOTTOM - min(1.0, max(0.0, share)) * (HEIGHT - BOTTOM - TOP)


def block_error_panels(modules: Sequence[ModuleRecord]) -> list[tuple[str, Markup]]:
    """(kind of linear, SVG) for each kind, in model order. Panels share both axes, so heights can be compared.

    A kind is the last part of a linear's name (q_proj). Where a block holds several of one kind, as experts do, the
    worst is drawn. Values that are missing, zero or not finite have no place on a logarithmic axis and leave a gap.
    """
    kinds: dict[str, list[ModuleRecord]] = {}
    inside = [module for module in modules if module.block is not None]
    for module in inside:
        kinds.setdefault(module.name.rpartition(".")[2], []).append(module)
    solved = {kind: _worst(members, "error") for kind, members in kinds.items()}
    rounded = {kind: _worst(members, "rounding_error") for kind, members in kinds.items()}
    values = [value for series in (*solved.values(), *rounded.values()) for value in series.values()]
    if not values:
        return []
    axis = _axis(min(values), max(values))
    last = max(module.block or 0 for module in inside)
    return [(kind, _panel(kind, solved[kind], rounded[kind], axis, last)) for kind in kinds]


def _worst(members: Sequence[ModuleRecord], field: str) -> dict[int, float]:
    """The largest positive, finite value of `field` in each block."""
    worst: dict[int, float] = {}
    for module in members:
        value = getattr(module, field)
        if module.block is not None and value is not None and math.isfinite(value) and value > 0:
            worst[module.block] = max(value, worst.get(module.block, 0.0))
    return worst


def _axis(low: float, high: float) -> Axis:
    """The nearest 1, 2 or 5 below and above the values; ticks at whole decades, or at 1, 2, 5 if those are too few."""
    first, final = math.floor(math.log10(low)), math.ceil(math.log10(high))
    grid = [digit * 10.0**power for power in range(first - 1, final + 2) for digit in (1, 2, 5)]
    bottom = max(tick for tick in grid if tick <= low * 1.0001)
    top = min(tick for tick in grid if tick >= high * 0.9999 and tick > bottom)
    step = 1 + (final - first) // 6
    decades = [10.0**power for power in range(first, final + 1, step) if bottom <= 10.0**power <= top]
    fine = [tick for tick in grid if bottom <= tick <= top]
    return Axis(bottom, top, tuple(decades if len(decades) > 2 else fine))


def _panel(kind: str, solved: Mapping[int, float], rounded: Mapping[int, float], axis: Axis, last: int) -> Markup:
    shapes = [_tick(value, axis) for value in axis.ticks]
    for block in sorted({0, last // 2, last}):
        shapes.append(
            Markup('<text class="tick" x="{}" y="{}" text-anchor="middle">{}</text>').format(
                _round(_x(block, last)), HEIGHT - BOTTOM + 14, block
            )
        )
    shapes.append(_series("rounding", "plain rounding", kind, rounded, axis, last))
    shapes.append(_series("solved", "this stage", kind, solved, axis, last))
    label = f"{kind}: relative output error over block, logarithmic"
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, HEIGHT, label, Markup("").join(shapes)
    )


def _tick(value: float, axis: Axis) -> Markup:
    y = _round(axis.y(value))
    return Markup(
        '<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>'
        '<text class="tick" x="{}" y="{}" text-anchor="end">{}</text>'
    ).format(LEFT, WIDTH - RIGHT, y, y, LEFT - 6, _round(y + 3.5), _tick_label(value))


def _tick_label(value: float) -> str:
    return f"{value:.0e}".replace("e-0", "e-") if value < 0.001 else f"{value:g}"


def _series(style: str, label: str, kind: str, values: Mapping[int, float], axis: Axis, last: int) -> Markup:
    """A line through neighbouring blocks (a gap where one is missing) and a dot for each."""
    runs: list[list[str]] = []
    dots: list[Markup] = []
    previous: int | None = None
    for block, value in sorted(values.items()):
        x, y = _round(_x(block, last)), _round(axis.y(value))
        if previous is None or block != previous + 1:
            runs.append([])
        runs[-1].append(f"{x},{y}")
        previous = block
        dots.append(
            Markup('<circle class="{}" cx="{}" cy="{}" r="2"><title>block {}, {}, {}: {}</title></circle>').format(
                style, x, y, block, kind, label, number(value)
            )
        )
    lines = [Markup('<polyline class="{}" points="{}"/>').format(style, " ".join(run)) for run in runs]
    return Markup("").join([*lines, *dots])


def _x(block: int, last: int) -> float:
    return LEFT + 6 + (WIDTH - LEFT - RIGHT - 12) * (block / last if last else 0.5)


def _round(value: float) -> float:
    return round(value, 1)


def time_bar(parts: Mapping[str, float]) -> Markup:
    """One bar, split in the order given; empty when there is no time to split."""
    total = sum(parts.values())
    if not total > 0:
        return Markup("")
    shapes: list[Markup] = []
    start = 0.0
    for index, (name, seconds) in enumerate(parts.items()):
        width = 100 * seconds / total
        shapes.append(
            Markup(
                '<rect class="part{}" x="{:.2f}" y="0" width="{:.2f}" height="4"><title>{}: {}</title></rect>'
            ).format(index % PARTS, start, width, name, duration(seconds))
        )
        start += width
    return Markup(
        '<svg class="bar" viewBox="0 0 100 4" preserveAspectRatio="none" role="img" aria-label="{}">{}</svg>'
    ).format("time by part", Markup("").join(shapes))
