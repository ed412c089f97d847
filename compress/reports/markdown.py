"""The Markdown face of a report. Text from outside is escaped where it is placed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from compress.evaluation.prompts.differences import Piece
from compress.reports import maps, precision, previous_words, pruning, serving
from compress.reports import standing as standings
from compress.reports.answers import UNCHANGED, introduction, shown
from compress.reports.limits import limits
from compress.reports.report import AnswersRecord, Report
from compress.reports.standing import NOTHING, Standing
from compress.reports.tables import (
    Table,
    event_counts_table,
    events_table,
    facts,
    gates_table,
    memory_table,
    noise_table,
    quality_tables,
    round_trip_table,
    split_recipe,
    stages_table,
    worst_table,
)
from compress.reports.task_tables import flips_tables, tasks_table
from compress.reports.words import MOST_EVENTS, about, duration, headline, showable


def escape(text: object) -> str:
    """Text for one place in a Markdown line: no markup, no HTML, no line breaks."""
    flat = " ".join(showable(str(text)).split())
    flat = flat.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*\[\]|~#])", r"\\\1", flat)


def fence(text: str, language: str = "") -> str:
    """`text` as a code block whose fence is longer than any run of backticks inside."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    ticks = "`" * max(3, longest + 1)
    return f"{ticks}{language}\n{showable(text).rstrip()}\n{ticks}"


def table_text(table: Table) -> str:
    """One table in Markdown, without its title."""
    rule = " | ".join("---:" if letter == "r" else "---" for letter in table.align)
    lines = [" | ".join(map(escape, table.headers)), rule, *(" | ".join(map(escape, row)) for row in table.rows)]
    return "\n".join(f"| {line} |" for line in lines)


def render_markdown(report: Report, standing: Standing = NOTHING) -> str:
    """The whole report as Markdown (GitHub tables). `standing`: channels and waivers as they are today."""
    parts = [f"# {report.verdict.capitalize()}: {escape(headline(report))}", escape(about(report))]
    parts += [escape(each) for each in standings.sentences(standing)]
    parts += _section("Waivers", [standings.waivers_table(standing)]) if standing.waivers else []
    parts += _previous(report)
    parts += _section("Gates", [gates_table(report)])
    parts += ["## Before and after", *_titled(quality_tables(report)), *_titled([noise_table(report)], none="")]
    if report.tasks:
        parts += [*_section("Tasks", [tasks_table(report)]), *_titled(flips_tables(report), none="No item flipped.")]
    parts += _answers(report.answers) if report.answers else []
    parts += _memory(report)
    parts += _making(report)
    parts += _section("Stages", [stages_table(report)])
    for stage in (stage for stage in report.stages if stage.facts):
        parts += [f"### What {escape(stage.kind)} did", _facts_text(precision.listed(stage))]
    parts.append("Steps of the run: " + escape("; ".join(_steps(report))) + ".")
    parts += _section("Events", [event_counts_table(report), events_table(report)])
    if len(report.events) > MOST_EVENTS:
        parts.append(f"The first {MOST_EVENTS} of {len(report.events):,} events; events.jsonl holds all.")
    trip = round_trip_table(report)
    parts += _section("Round trip", [trip] if trip else [])
    parts += _origin(report, standing)
    return "\n\n".join(part for part in parts if part) + "\n"


def _previous(report: Report) -> list[str]:
    """What changed against the release before; against the source, see the tables of measurements."""
    record = report.previous
    if record is None:
        return []
    said = "\n".join(f"- {escape(each)}" for each in previous_words.sentences(record))
    return [f"## {escape(previous_words.title(record))}", said, *_titled(previous_words.tables(record), none="")]


def _memory(report: Report) -> list[str]:
    cache = serving.cache_table(report.memory)
    parts = _section("Memory", [memory_table(report)])
    if cache.rows:
        parts += [f"### {cache.title}", escape(serving.sentence(report.memory)), serving.NOTE, table_text(cache)]
    return parts


def _making(report: Report) -> list[str]:
    """What stages did to the model."""
    parts = []
    for pruned in pruning.shown(report):
        parts += ["## Pruning", escape(pruned["sentence"]), *_titled(pruned["tables"])]
        if pruned["alone"]:
            parts += ["### Pruned, or only quantised", escape(pruned["alone"]), table_text(pruned["alone_table"])]
    for plan in precision.planners(report):
        said = [escape(precision.sentence(plan.facts)), escape(precision.trust(plan.facts))]
        parts += ["## Bits by linear", *said]
        parts += _titled([precision.bought_table(plan.facts), precision.schemes_table(plan.facts)])
    parts += ["## Error per block", *_titled([maps.error_table(report)], none="No stage quantised a linear.")]
    parts.append(escape(maps.unmeasured(report)))
    return parts + _titled([worst_table(stage) for stage in report.stages if stage.modules], none="")


def _origin(report: Report, standing: Standing) -> list[str]:
    """What went in and where it was made; then what was not tested, and the recipe."""
    rest, recipe = split_recipe(report.provenance)
    parts = ["## Provenance", _facts_text({"artifact": report.artifact.model_dump(), **rest})]
    parts += ["### Calibration", _facts_text(report.calibration)]
    parts += ["### Evaluation", *(_facts_text(item) for item in report.evaluation)]
    parts += ["## Limits", "\n".join(f"- {escape(limit)}" for limit in limits(report, standing))]
    return parts + (["## Recipe", fence(recipe, "yaml")] if recipe else [])


def _answers(answers: AnswersRecord) -> list[str]:
    """Both models' answers, what only one of them wrote in bold."""
    parts = ["## Answers side by side", f"{escape(introduction(answers))} What only one of them wrote is bold."]
    for pair in shown(answers):
        same = f" ({UNCHANGED})" if pair.same else ""
        rows = [("Prompt", escape(pair.prompt))]
        rows += [(side.title, "".join(_piece(piece) for piece in side.pieces)) for side in pair.sides]
        lines = "\n".join(f"| {title} | {text} |" for title, text in rows)
        parts.append(f"### {escape(pair.id)}{same}\n\n| Who | Text |\n| --- | --- |\n{lines}")
    return parts


def _piece(piece: Piece) -> str:
    """Escaped, in bold where it differs; spaces stay outside, or Markdown would not see the bold."""
    text = escape(piece.text)
    left, right = (" " if piece.text[:1].isspace() else ""), (" " if piece.text[-1:].isspace() else "")
    if not text:
        return " "
    return f"{left}<b>{text}</b>{right}" if piece.differs else f"{left}{text}{right}"


def _section(title: str, tables: list[Table]) -> list[str]:
    texts = [table_text(table) for table in tables if table.rows]
    return [f"## {title}", *(texts or ["None."])]


def _titled(tables: Iterable[Table], none: str = "None.") -> list[str]:
    return [f"### {escape(table.title)}\n\n{table_text(table)}" for table in tables if table.rows] or [none]


def _steps(report: Report) -> list[str]:
    return [f"{step} {duration(seconds)}" for step, seconds in report.seconds_by_step.items()]


def _facts_text(mapping: Mapping[str, Any]) -> str:
    return table_text(Table("", ("What", "Value"), "ll", facts(mapping)))
