"""A frontier as a page of its own: a plot of mean KL over bytes, and its table."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from compress.reports.html import pages
from compress.reports.tables import Table
from compress.reports.words import everywhere, number, showable, size

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 380, 70, 20, 16, 44


def frontier_table(points: Sequence[Mapping[str, Any]]) -> Table:
    rows = [
        (
            everywhere(point["scheme"]) if point["scheme"] else "mixture",
            f"{point['effective_bits']:.3f}",
            size(point["linear_bytes"]),
            size(point["weight_bytes"]),
            number(point["kl"]),
            f"× {point['perplexity_ratio']:.3f}",
        )
        for point in points
    ]
    headers = ("Choice", "Bits", "Chosen for", "All tensors", "Mean KL (nats)", "Perplexity")
    return Table("Points", headers, "lrrrrr", rows)


def plot(points: Sequence[Mapping[str, Any]], max_kl: float | None = None) -> Markup:
    """Mean KL (logarithmic) over bytes of all tensors: mixtures joined by a line, uniform choices as squares."""
    shown = [point for point in points if point["kl"] > 0]
    if not shown:
        return Markup("")
    sizes = [point["weight_bytes"] for point in shown]
    left = float(min(sizes))
    right = float(max(max(sizes), left + 1))
    levels = [math.log10(point["kl"]) for point in shown]
    bottom, top = math.floor(min(levels) * 2) / 2, math.ceil(max(levels) * 2) / 2
    top = top if top > bottom else bottom + 0.5

    def x(value: float) -> float:
        return round(LEFT + 14 + (WIDTH - LEFT - RIGHT - 28) * (value - left) / (right - left), 1)

    def y(value: float) -> float:
        share: float = (math.log10(value) - bottom) / (top - bottom)
        return round(HEIGHT - BOTTOM - share * (HEIGHT - BOTTOM - TOP), 1)

    shapes = [_level(10 ** (step / 2), y) for step in range(round(bottom * 2), round(top * 2) + 1)]
    shapes += [_amount(left + (right - left) * step / 4, x) for step in range(5)]
    if max_kl and 10**bottom <= max_kl <= 10**top:
        shapes.append(
            Markup('<line class="bound" x1="{}" x2="{}" y1="{}" y2="{}"><title>bound {}</title></line>').format(
                LEFT, WIDTH - RIGHT, y(max_kl), y(max_kl), number(max_kl)
            )
        )
    mixtures = sorted((point for point in shown if not point["scheme"]), key=lambda point: point["weight_bytes"])
    line = " ".join(f"{x(point['weight_bytes'])},{y(point['kl'])}" for point in mixtures)
    shapes.append(Markup('<polyline class="solved" points="{}"/>').format(line))
    for point in shown:
        shapes.append(_mark(point, x(point["weight_bytes"]), y(point["kl"])))
    return Markup('<svg class="frontier" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, HEIGHT, "mean KL over bytes of all tensors", Markup("").join(shapes)
    )


def _level(value: float, y: Callable[[float], float]) -> Markup:
    return Markup(
        '<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>'
        '<text class="tick" x="{}" y="{}" text-anchor="end">{}</text>'
    ).format(LEFT, WIDTH - RIGHT, y(value), y(value), LEFT - 8, y(value) + 4, f"{value:.2g}")


def _amount(value: float, x: Callable[[float], float]) -> Markup:
    return Markup('<text class="tick" x="{}" y="{}" text-anchor="middle">{}</text>').format(
        x(value), HEIGHT - BOTTOM + 20, size(value)
    )


def _mark(point: Mapping[str, Any], x: float, y: float) -> Markup:
    title = f"{point['scheme'] or 'mixture'}: {point['effective_bits']:.3f} bits, mean KL {number(point['kl'])} nats"
    if not point["scheme"]:
        return Markup('<circle class="solved" cx="{}" cy="{}" r="4"><title>{}</title></circle>').format(x, y, title)
    words = point["scheme"].split("; ")[0].replace(" symmetric", "").replace("group ", "g")
    return Markup(
        '<rect class="uniform" x="{}" y="{}" width="8" height="8"><title>{}</title></rect>'
        '<text class="tick" x="{}" y="{}" text-anchor="{}">{}</text>'
    ).format(x - 4, y - 4, title, *((x - 7, y - 7, "end") if x > WIDTH - 90 else (x + 7, y - 5, "start")), words)


def frontier_page(found: Mapping[str, Any]) -> str:
    """The page, self-contained."""
    page = (
        pages()
        .get_template("frontier.html.j2")
        .render(
            name=found["name"],
            tokens=f"{found['tuning_tokens']:,}",
            picture=plot(found["points"], found["max_kl"]),
            points=frontier_table(found["points"]),
            smallest=sentence(found),
            trust=_trust(found),
        )
    )
    return showable(page)


def _trust(found: Mapping[str, Any]) -> str:
    if found["r2"] is None:
        return ""
    return (
        f"Predicted against measured: R² {found['r2']:.3f} of the logarithms, rank correlation {number(found['rank'])}."
    )


def sentence(found: Mapping[str, Any]) -> str:
    """What was found for the bound, if one was asked for."""
    if found["max_kl"] is None:
        return ""
    smallest = found["smallest"]
    if smallest is None:
        return f"No mixture of these candidates has a mean KL of at most {number(found['max_kl'])} nats."
    return (
        f"The smallest mixture found with a mean KL of at most {number(found['max_kl'])} nats takes "
        f"{smallest['effective_bits']:.3f} bits a weight, {size(smallest['weight_bytes'])} in all: "
        f"budget: {{effective_bits: {math.ceil(smallest['effective_bits'] * 1e4) / 1e4:g}}}."
    )
