"""What GitHub Actions shows of a report."""

from __future__ import annotations

import re

import pytest

from compress.reports import github
from compress.reports.github import MOST, SUMMARY_BYTES, of_gates, of_mistakes, summary
from tests.reports.example import example_report

COMMAND = re.compile(r"::(error|warning|notice) title=([^:,\n]*)::([^\n\r]*)")


def test_a_report_that_passed_is_one_notice() -> None:
    (line,) = of_gates(example_report("passed"))
    assert line.startswith("::notice title=compress%3A passed::") and "met all" in line


@pytest.mark.parametrize(
    ("tier", "verdict", "level"),
    [
        ("critical", "failed", "error"),
        ("critical", "inconclusive", "warning"),
        ("supporting", "failed", "warning"),
        ("supporting", "inconclusive", "notice"),
        ("advisory", "failed", "notice"),
    ],
)
def test_how_loud_a_gate_is_depends_on_what_it_decides(tier, verdict, level) -> None:
    report = example_report("passed")
    gate = report.gates[0].model_copy(update={"tier": tier, "verdict": verdict, "sentence": "the sentence"})
    lines = of_gates(report.model_copy(update={"gates": [gate]}))
    assert any(line.startswith(f"::{level} ") and line.endswith("::the sentence") for line in lines)


def test_text_cannot_end_its_command_or_begin_another() -> None:
    report = example_report("failed")
    hostile = "100 % worse\n::error title=x::forged\r\x1b[31m"
    gate = report.gates[0].model_copy(
        update={"verdict": "failed", "measure": "a:b,c\n::notice::x", "sentence": hostile}
    )
    for line in of_gates(report.model_copy(update={"gates": [gate]})):
        assert COMMAND.fullmatch(line), line
    forged = of_mistakes("BAD_RECIPE", [hostile])
    assert len(forged) == 1 and "100 %25 worse%0A" in forged[0] and "\x1b" not in forged[0]


def test_no_more_annotations_of_a_level_than_are_shown() -> None:
    lines = of_mistakes("BAD_RECIPE", [f"mistake {at}" for at in range(25)])
    assert len(lines) == MOST and lines[-1].endswith("::and 16 more; the report has all of them")
    assert len(of_mistakes("BAD_RECIPE", ["one"] * MOST)) == MOST


def test_a_summary_has_what_a_reviewer_asks_first() -> None:
    text = summary(example_report("failed"), "out/report.html")
    for wanted in (
        "### Failed:",
        "| Verdict | Tier |",
        "Perplexity",
        "#### Memory",
        "damping",
        "out/report.html",
    ):
        assert wanted in text, wanted


def test_a_summary_stays_below_the_limit_and_says_what_it_leaves_out() -> None:
    report = example_report("passed")
    gates = [report.gates[0].model_copy(update={"sentence": "ü" * 5000})] * 150
    text = summary(report.model_copy(update={"gates": gates}), "report.html")
    assert len(text.encode()) < SUMMARY_BYTES + 100
    assert "too long for a summary" in text and text.rstrip().endswith("report.html")


def test_markup_in_names_stays_text() -> None:
    report = example_report("passed")
    gate = report.gates[0].model_copy(update={"measure": "<img src=x>|`"})
    text = summary(report.model_copy(update={"gates": [gate]}), "<b>")
    assert "<img" not in text and "<b>" not in text
    assert github.MOST == 10
