"""The pictures: every value has its place, missing values leave gaps, and colours can be told from their ground."""

from __future__ import annotations

import re
from importlib.resources import files
from xml.etree import ElementTree

import pytest

from compress.reports.pictures import block_error_panels, time_bar
from compress.reports.report import ModuleRecord

from .example import modules


def record(block: int, error: float | None, name: str = "up_proj") -> ModuleRecord:
    return ModuleRecord(name=f"{block}.{name}", block=block, scheme="int4", error=error, seconds=1, effective_bits=4)


def circles(svg: str, style: str) -> list[tuple[float, float]]:
    found = ElementTree.fromstring(svg).findall(f".//circle[@class='{style}']")
    return [(float(circle.get("cx", "")), float(circle.get("cy", ""))) for circle in found]


def test_each_kind_has_a_panel_with_a_dot_for_each_block_and_series() -> None:
    panels = block_error_panels(modules())
    assert [kind for kind, _ in panels] == [
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    ]  # fmt: skip
    for _, svg in panels:
        assert len(circles(svg, "solved")) == len(circles(svg, "rounding")) == 30


def test_a_larger_error_is_drawn_higher_and_inside_the_panel() -> None:
    [(_, svg)] = block_error_panels([record(0, 0.001), record(1, 0.01), record(2, 0.5)])
    points = circles(svg, "solved")
    assert [x for x, _ in points] == sorted(x for x, _ in points)
    assert [y for _, y in points] == sorted((y for _, y in points), reverse=True)
    assert all(0 < x < 320 and 0 < y < 170 for x, y in points)


def test_missing_zero_and_infinite_errors_leave_a_gap() -> None:
    values = [0.1, None, 0.2, 0.0, 0.3, float("inf"), float("nan"), 0.4]
    [(_, svg)] = block_error_panels([record(block, value) for block, value in enumerate(values)])
    assert len(circles(svg, "solved")) == 4
    assert svg.count('<polyline class="solved"') == 4


def test_the_worst_of_many_experts_is_drawn() -> None:
    [(_, svg)] = block_error_panels([record(0, 0.01), record(0, 0.05), record(0, 0.02)])
    assert "0.05</title>" in svg and len(circles(svg, "solved")) == 1


@pytest.mark.parametrize("errors", [[], [None], [0.0], [float("nan")]])
def test_without_errors_there_is_no_picture(errors: list[float | None]) -> None:
    assert block_error_panels([record(block, error) for block, error in enumerate(errors)]) == []


@pytest.mark.parametrize("errors", [[0.1], [1.0, 1.0], [1e-12, 1e6], [0.99, 1.01], [1e-300, 1e-299]])
def test_any_range_of_errors_has_an_axis_with_at_least_two_ticks(errors: list[float]) -> None:
    [(_, svg)] = block_error_panels([record(block, error) for block, error in enumerate(errors)])
    assert 2 <= svg.count('class="grid"') <= 8


def test_names_cannot_break_out_of_the_picture() -> None:
    [(_, svg)] = block_error_panels([record(0, 0.1, name='"><script>x</script>')])
    assert "<script>" not in svg
    ElementTree.fromstring(svg)


def test_a_time_bar_is_filled_completely() -> None:
    root = ElementTree.fromstring(time_bar({"forward": 1.0, "solve": 2.0, "write": 1.0}))
    widths = [float(part.get("width", "")) for part in root.findall("rect")]
    assert widths == [25.0, 50.0, 25.0]
    assert time_bar({}) == "" and time_bar({"nothing": 0.0}) == ""


# --- colours ----------------------------------------------------------------------------------------------------------


def luminance(colour: str) -> float:
    """Relative luminance as WCAG 2.1 defines it."""
    full = colour if len(colour) == 7 else "#" + "".join(2 * digit for digit in colour[1:])
    channels = [int(full[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [0, 1, 2], ids=["light", "dark", "print"])
def test_text_and_lines_stand_out_from_their_ground(theme: int) -> None:
    style = (files("compress.reports") / "templates" / "style.css.j2").read_text()
    block = re.findall(r":root \{(.*?)\}", style, re.DOTALL)[theme]
    colours = dict(re.findall(r"--([a-z0-9-]+): (#[0-9a-f]+)", block))
    for text in ("ink", "soft"):
        for ground in ("paper", "panel"):
            assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
    for verdict in ("passed", "failed", "inconclusive"):
        assert contrast(colours[verdict], colours[f"{verdict}-back"]) >= 4.5, verdict
        assert contrast(colours["ink"], colours[f"{verdict}-back"]) >= 4.5, verdict
    for line in ("solved", "rounding", *(f"part{index}" for index in range(6))):
        assert contrast(colours[line], colours["paper"]) >= 3, line


def mixed(one: str, other: str, share: int) -> str:
    """`color-mix(in srgb, one share%, other)`."""
    pairs = [(int(one[at : at + 2], 16), int(other[at : at + 2], 16)) for at in (1, 3, 5)]
    return "#" + "".join(f"{round(a * share / 100 + b * (1 - share / 100)):02x}" for a, b in pairs)


@pytest.mark.parametrize("theme", [0, 1, 2], ids=["light", "dark", "print"])
def test_numbers_on_shades_links_and_labels_can_be_read(theme: int) -> None:
    style = (files("compress.reports") / "templates" / "style.css.j2").read_text()
    block = re.findall(r":root \{(.*?)\}", style, re.DOTALL)[theme]
    colours = dict(re.findall(r"--([a-z0-9-]+): (#[0-9a-f]+)", block))
    colours = {
        name: value if len(value) == 7 else "#" + "".join(2 * x for x in value[1:]) for name, value in colours.items()
    }
    bits = [int(share) for share in re.findall(r"\(\d+, (\d+)\)", re.search(r"in \[(\(2.*?)\] %", style)[1])]  # type: ignore[index]
    errors = [int(share) for share in re.search(r"for share in \[([\d, ]+)\]", style)[1].split(", ")]  # type: ignore[index]
    assert len(bits) == 7 and len(errors) == 5
    for name, shares in (("solved", bits), ("heat", errors)):
        for share in shares:
            assert contrast(colours["ink"], mixed(colours[name], colours["panel"], share)) >= 4.5, (name, share)
    for text in ("solved", "failed"):  # links, and names of GPUs
        assert contrast(colours[text], colours["paper"]) >= 4.5, text
    assert contrast(colours["ink"], colours["passed-back"]) >= 4.5


def test_layouts_of_narrow_screens_are_kept_from_paper() -> None:
    """A sheet of paper is 700 to 800 pixels wide, but its text is small: tables stay tables there."""
    style = (files("compress.reports") / "templates" / "style.css.j2").read_text()
    narrow = re.findall(r"@media ([^{]*max-width[^{]*)", style)
    assert narrow and all(each.startswith("screen and ") for each in narrow)
