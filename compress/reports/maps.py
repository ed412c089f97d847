"""Maps of a model: blocks from left to right, kinds of linear from top to bottom, a cell for each linear.

A map is cut into pieces of a few blocks, which stand beside each other on a wide page and below each other on a narrow
one, so that no cell becomes too small to read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from compress.reports.report import KeptRecord, ModuleRecord, Report
from compress.reports.tables import Table
from compress.reports.words import MISSING, number

CELL, TOP = 24, 18
"""Sizes in units of the view box: a cell's width, the margin for numbers of blocks."""
LETTER = 6.2
"""Width of a letter of a label, roughly."""
LONGEST = 16
"""Letters of a label; the rest is cut."""
PIECE = 10
"""Blocks of one piece."""
LEVELS = 5
"""Shades of error in the style sheet: `.error0` is the least."""


@dataclass(frozen=True)
class Cell:
    """One linear. `bar` is a share of 1, or None where no cell of the map has one."""

    kind: str
    block: int
    style: str
    text: str
    title: str
    bar: float | None = None


def pieces(cells: Sequence[Cell], label: str) -> list[Markup]:
    """The map as SVGs of at most `PIECE` blocks each."""
    kinds = list(dict.fromkeys(cell.kind for cell in cells))
    blocks = sorted({cell.block for cell in cells})
    return [
        _piece([cell for cell in cells if cell.block in part], kinds, part, label)
        for part in (blocks[start : start + PIECE] for start in range(0, len(blocks), PIECE))
    ]


def _piece(cells: Sequence[Cell], kinds: Sequence[str], blocks: Sequence[int], label: str) -> Markup:
    left = 14 + LETTER * max(len(_short(kind)) for kind in kinds)
    row = 34 if any(cell.bar is not None for cell in cells) else 24
    shapes = [
        Markup('<text class="tick" x="{}" y="{}" text-anchor="middle">{}</text>').format(
            round(left + CELL * (at + 0.5), 1), TOP - 6, block
        )
        for at, block in enumerate(blocks)
    ]
    for at, kind in enumerate(kinds):
        y = TOP + row * at
        shapes.append(
            Markup('<text class="tick" x="{}" y="{}" text-anchor="end"><title>{}</title>{}</text>').format(
                round(left - 8, 1), y + 15, kind, _short(kind)
            )
        )
        shapes += [
            _cell(cell, round(left + CELL * blocks.index(cell.block), 1), y) for cell in cells if cell.kind == kind
        ]
    # Pieces are equally wide, so that cells of the last, shorter one are as large as the others'.
    return Markup('<svg class="map" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        round(left + CELL * PIECE + 4),
        TOP + row * len(kinds),
        f"{label}, blocks {blocks[0]} to {blocks[-1]}",
        Markup("").join(shapes),
    )


def _short(kind: str) -> str:
    words = kind.replace("_proj", "")
    return words if len(words) <= LONGEST else f"{words[: LONGEST - 1]}…"


def _cell(cell: Cell, x: float, y: float) -> Markup:
    inside = CELL - 2
    bar = (
        Markup("")
        if cell.bar is None
        else Markup('<rect class="sensitive" x="{}" y="{}" width="{:.1f}" height="4"/>').format(
            x, y + 22, inside * cell.bar
        )
    )
    return Markup(
        '<g><title>{}</title><rect class="{}" x="{}" y="{}" width="{}" height="20"/>'
        '<text class="bit" x="{}" y="{}" text-anchor="middle">{}</text>{}</g>'
    ).format(cell.title, cell.style, x, y, inside, x + inside / 2, y + 14, cell.text, bar)


# --- error and bits of every linear ----------------------------------------------------------------------------------


def last_records(report: Report) -> dict[str, ModuleRecord]:
    """{linear: what the last stage that wrote it recorded}, in model order; with the error of an earlier stage where
    the last one gave it the same scheme and measured none (`unmeasured`)."""
    found: dict[str, ModuleRecord] = {}
    for stage in report.stages:
        for module in stage.modules:
            before = found.get(module.name)
            if module.error is None and before is not None and before.scheme == module.scheme:
                known = {"error": before.error, "rounding_error": before.rounding_error}
                module = module.model_copy(update=known)
            found[module.name] = module
    return found


def unmeasured(report: Report) -> str:
    """A sentence where a stage changed linears whose error was measured before it, and measured none; else empty."""
    schemes: dict[str, str] = {}
    kinds: dict[str, None] = {}
    for stage in report.stages:
        for module in stage.modules:
            if module.error is not None:
                schemes[module.name] = module.scheme
            elif schemes.get(module.name) == module.scheme:
                kinds[stage.kind] = None
    return f"Errors are those before {' and '.join(kinds)}, which measured none." if kinds else ""


def error_cells(report: Report) -> list[Cell]:
    """Every linear in the end: bits as a number, error as a shade."""
    found = _by_place(report)
    levels = error_levels([module.error for module in found.values()])
    return [
        Cell(kind, block, f"error{_level(module.error, levels)}", bits_text(module), _title(module))
        for (kind, block), module in found.items()
    ] + [
        Cell(kind, block, "errornone", _digits(kept.dtype), f"{kept.name}: {kept.dtype}, not quantised")
        for (kind, block), kept in kept_by_place(report).items()
        if (kind, block) not in found
    ]


def _by_place(report: Report) -> dict[tuple[str, int], ModuleRecord]:
    """{(kind, block): record}; where a block holds several of one kind, as experts do, the largest error's."""
    found: dict[tuple[str, int], ModuleRecord] = {}
    for module in last_records(report).values():
        if module.block is None:
            continue
        key = module.name.rpartition(".")[2], module.block
        if key not in found or (module.error or 0.0) > (found[key].error or 0.0):
            found[key] = module
    return found


def kept_by_place(report: Report) -> dict[tuple[str, int], KeptRecord]:
    """{(kind, block): a linear that was not quantised}."""
    return {(kept.name.rpartition(".")[2], kept.block): kept for kept in report.kept}


def error_levels(errors: Sequence[float | None]) -> list[float]:
    """Upper bounds of the shades, evenly apart on a logarithmic scale; empty where no error was measured."""
    known = [error for error in errors if error is not None and math.isfinite(error) and error > 0]
    if not known:
        return []
    low, high = math.log(min(known)), math.log(max(known))
    return [math.exp(low + (high - low) * step / LEVELS) for step in range(1, LEVELS + 1)]


def _level(error: float | None, levels: Sequence[float]) -> str:
    """The number of the shade, or "none" for what was not measured; no error at all is the least."""
    if error is None or not levels or math.isnan(error):
        return "none"
    return str(next((at for at, most in enumerate(levels) if error <= most * 1.000001), LEVELS - 1))


def bits_text(module: ModuleRecord) -> str:
    """Bits without scales, from the scheme's first word (int4, nf4, fp8); 16 and more are "16"."""
    return _digits(module.scheme.split(" ")[0])[:2] or f"{module.effective_bits:.0f}"


def _digits(text: str) -> str:
    return "".join(letter for letter in text if letter.isdigit())


def _title(module: ModuleRecord) -> str:
    return (
        f"{module.name}: {module.scheme}, {module.effective_bits:.3f} bits with scales, error {number(module.error)}"
        + (f", plain rounding {number(module.rounding_error)}" if module.rounding_error is not None else "")
    )


def error_legend(report: Report) -> list[tuple[str, str]]:
    """(style of a swatch, what it stands for)."""
    levels = error_levels([module.error for module in last_records(report).values()])
    legend = [(f"error{at}", f"to {number(most)}") for at, most in enumerate(levels)]
    return legend + ([("errornone", "not quantised")] if report.kept else [])


def error_table(report: Report) -> Table:
    """The same in words, for faces without pictures: a row for each block."""
    found, kept = _by_place(report), kept_by_place(report)
    places = list(dict.fromkeys([*found, *kept]))
    kinds = list(dict.fromkeys(kind for kind, _ in places))
    rows = [
        (str(block), *(_words(found.get((kind, block)), kept.get((kind, block))) for kind in kinds))
        for block in sorted({block for _, block in places})
    ]
    return Table("Bits and error of every linear", ("Block", *kinds), "r" + "r" * len(kinds), rows)


def _words(module: ModuleRecord | None, kept: KeptRecord | None) -> str:
    if module is None:
        return MISSING if kept is None else f"{_digits(kept.dtype)} b, kept"
    return f"{bits_text(module)} b, {number(module.error)}"
