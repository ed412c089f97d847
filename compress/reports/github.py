"""A report for GitHub Actions: annotations, which a pull request shows, and the summary of a step.

Annotations are workflow commands, one a line: `::error title=...::sentence`. The runner looks for them on stdout and on
stderr alike (actions/runner, ScriptHandler.cs), shows ten of each level a step, and takes a summary of at most 1 MiB.
https://docs.github.com/en/actions/reference/workflows-and-actions/workflow-commands
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from compress.reports.markdown import escape, table_text
from compress.reports.report import GateResult, Report
from compress.reports.tables import Table, event_counts_table, gates_table, memory_table, quality_tables
from compress.reports.task_tables import tasks_table
from compress.reports.words import about, headline, showable

Level = Literal["error", "warning", "notice"]
MOST = 10
"""Annotations of one level that a step shows; of more, the rest is counted in the last."""
SUMMARY_BYTES = 1_000_000
_LEVELS: dict[str, Level] = {"passed": "notice", "failed": "error", "inconclusive": "warning"}


def of_gates(report: Report) -> list[str]:
    """The verdict, then every gate that did not pass: critical failures are errors, what is undecided or supporting is
    a warning, what only informs a notice."""
    found: list[tuple[Level, str, str]] = [(_LEVELS[report.verdict], f"compress: {report.verdict}", headline(report))]
    found += [
        (_level(gate), f"{gate.verdict}: {gate.measure}", gate.sentence)
        for gate in report.gates
        if gate.verdict != "passed"
    ]
    return _lines(found)


def of_mistakes(code_name: str, sentences: Iterable[str]) -> list[str]:
    """Annotations of a command that ended with an error before there was a report."""
    return _lines([("error", f"compress: {code_name.lower().replace('_', ' ')}", sentence) for sentence in sentences])


def _level(gate: GateResult) -> Level:
    if gate.tier == "advisory" or (gate.tier == "supporting" and gate.verdict == "inconclusive"):
        return "notice"
    return "error" if gate.tier == "critical" and gate.verdict == "failed" else "warning"


def _lines(found: list[tuple[Level, str, str]]) -> list[str]:
    """As workflow commands, no more of a level than are shown."""
    lines = []
    for level in ("error", "warning", "notice"):
        mine = [(title, text) for of, title, text in found if of == level]
        kept = mine if len(mine) <= MOST else mine[: MOST - 1]
        lines += [f"::{level} title={_property(title)}::{_data(text)}" for title, text in kept]
        if len(kept) < len(mine):
            lines.append(f"::{level} title=compress::and {len(mine) - len(kept)} more; the report has all of them")
    return lines


def _data(text: str) -> str:
    return showable(text).replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")


def summary(report: Report, where: str) -> str:
    """GitHub Markdown for $GITHUB_STEP_SUMMARY: the verdict, the gates, before and after, memory, events. `where`:
    where the whole report lies. Sections that would pass GitHub's limit are left out, and it says so."""
    parts = [f"### {report.verdict.capitalize()}: {escape(headline(report))}", escape(about(report))]
    parts += [_text(gates_table(report)), *(_text(table, titled=True) for table in quality_tables(report))]
    parts += [_text(tasks_table(report), titled=True)] if report.tasks else []
    parts += [_text(memory_table(report), titled=True), _text(event_counts_table(report), titled=True)]
    parts = [part for part in parts if part]
    end = f"Report: {escape(where)}\n"
    kept, size = [], len(end.encode())
    for part in parts:
        size += len(part.encode()) + 2
        if size > SUMMARY_BYTES:
            kept.append("The rest is too long for a summary.")
            break
        kept.append(part)
    return "\n\n".join([*kept, end])


def _text(table: Table, titled: bool = False) -> str:
    if not table.rows:
        return ""
    return (f"#### {escape(table.title)}\n\n" if titled else "") + table_text(table)
