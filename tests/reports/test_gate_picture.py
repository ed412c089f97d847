"""The picture of a gate puts what was observed on the right side of its bound."""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree

import pytest

from compress.reports.gate_picture import WIDTH, bounds, strip, strips
from compress.reports.report import GateResult

from .example import HOSTILE, example_report


def gate(**changes: Any) -> GateResult:
    fields: dict[str, Any] = {
        "kind": "threshold",
        "measure": "divergence.s.mean_kl",
        "observed": 0.05,
        "interval": (0.04, 0.06),
        "limit": "<= 0.1",
        "verdict": "passed",
        "sentence": "",
    }
    return GateResult(**(fields | changes))


@pytest.mark.parametrize(
    ("limit", "changes", "wanted"),
    [
        ("<= 0.1", {}, (None, 0.1)),
        (">= 0.9 and <= 1.1 x source", {"kind": "relative", "observed": 1.0}, (0.9, 1.1)),
        ("<= 1e-05", {}, (None, 1e-5)),
        ("<= 1,234,567", {}, (None, 1_234_567)),
        ("<= 2,048 bytes", {"kind": "memory"}, (None, 2048)),
        ("<= 1.2 x source", {"kind": "latency"}, (None, 1.2)),
        ("<= 0.03 s", {"kind": "latency"}, (None, 0.03)),
        ("loss <= 2 %", {"kind": "non_inferiority"}, (None, 0.02)),
        ("loss <= 1.5 points", {"kind": "non_inferiority"}, (None, 0.015)),
        ("<= 0.05 nats", {"kind": "non_inferiority"}, (None, 0.05)),
        (
            "weight_bytes <= 0.45 x the recipe's source and effective_bits <= 4.5",
            {"kind": "size", "measure": "effective_bits", "observed": 4.6, "verdict": "failed"},
            (None, 4.5),
        ),
        (
            "weight_bytes <= 1,000 and weight_bytes <= 0.3 x the recipe's source",
            {"kind": "size", "measure": "weight_bytes", "observed": 0.4, "verdict": "failed"},
            (None, 0.3),
        ),
    ],
)
def test_bounds_are_read_from_the_words_of_every_kind_of_gate(limit, changes, wanted) -> None:
    assert bounds(gate(limit=limit, **changes)) == pytest.approx(wanted)


def drawn(found: GateResult) -> tuple[float, float, tuple[float, float]]:
    """(observed, limit, interval) from left to right, as drawn."""
    picture = strip(found)
    assert picture is not None
    root = ElementTree.fromstring(picture)
    circle, limit, bar = (
        root.find(f".//{path}") for path in ("circle", "line[@class='limit']", "line[@class='interval']")
    )
    assert circle is not None and limit is not None and bar is not None
    return (
        float(circle.get("cx", "")),
        float(limit.get("x1", "")),
        (float(bar.get("x1", "")), float(bar.get("x2", ""))),
    )


def test_what_passed_lies_on_the_allowed_side_and_its_interval_around_it() -> None:
    observed, limit, (low, high) = drawn(gate())
    assert 0 < low < observed < high < limit < WIDTH
    observed, limit, _ = drawn(gate(observed=0.2, interval=(0.19, 0.21), verdict="failed"))
    assert observed > limit


def test_an_interval_over_the_bound_is_seen_to_be() -> None:
    _, limit, (low, high) = drawn(gate(interval=(0.04, 0.14), verdict="inconclusive"))
    assert low < limit < high


@pytest.mark.parametrize(
    "changes",
    [
        {"observed": None},
        {"observed": float("nan")},
        {"limit": "as small as can be"},
        {"observed": 102_760_448.0, "limit": "<= 0.45 x source", "interval": None},
    ],
)
def test_nothing_is_drawn_where_a_number_is_missing_or_in_another_unit(changes: dict[str, Any]) -> None:
    assert strip(gate(**changes)) is None


@pytest.mark.parametrize("value", [0.0, -1.0, 1e-300, 1e300])
def test_observed_at_its_bound_has_a_place(value: float) -> None:
    picture = strip(gate(observed=value, limit=f"<= {value:g}", interval=None))
    assert picture is not None and "nan" not in picture and "inf" not in picture


def test_every_gate_of_a_report_has_a_row_and_names_cannot_break_out() -> None:
    assert [each.verdict for each in strips(example_report("failed"))] == ["passed", "failed", "passed", "passed"]
    picture = strip(gate(measure=HOSTILE.replace("\x01", "").replace("\x1b", "")))
    assert picture is not None and "<script>" not in picture
    ElementTree.fromstring(picture)
