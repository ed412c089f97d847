"""Tasks of a report as finished text: one table of all, and items that changed sides, shared by Markdown and HTML."""

from __future__ import annotations

from collections.abc import Sequence

from compress.reports.report import Flip, Report, TaskRecord
from compress.reports.tables import Table
from compress.reports.words import MISSING, interval_text, number, percent


def tasks_table(report: Report) -> Table:
    """One row a task."""
    rows = [
        (
            task.name,
            percent(task.accuracy_source),
            percent(task.accuracy_compressed),
            f"{100 * (task.accuracy_compressed - task.accuracy_source):+.1f} points",
            interval_text("accuracy", task.interval_compressed),
            f"{task.items:,}" if task.items == task.available else f"{task.items:,} of {task.available:,}",
            f"{task.lost} lost, {task.gained} gained",
            number(task.degraded_p),
            _losses(task),
            _put(task),
        )
        for task in report.tasks
    ]
    headers = (
        "Task",
        "Source",
        "Compressed",
        "Difference",
        "95 % interval of compressed",
        "Items",
        "Flips",
        "McNemar p",
        "Nats per answer",
        "Put as",
    )
    return Table("Tasks", headers, "lrrrrrlrrl", rows)


def _losses(task: TaskRecord) -> str:
    if task.nll_source is None:
        return MISSING
    return f"{number(task.nll_source)} → {number(task.nll_compressed)}"


def _put(task: TaskRecord) -> str:
    """How the questions were put, in words."""
    words = [task.type.replace("_", " ")]
    if task.few_shot:
        words.append(f"{task.few_shot} examples")
    words.append("chat template" if task.chat_template else "no chat template")
    return ", ".join(words)


def flips_tables(report: Report) -> list[Table]:
    """For every task and direction with flips: the first items that changed sides."""
    found = []
    for task in report.tasks:
        for flips, count, what in ((task.lost_examples, task.lost, "lost"), (task.gained_examples, task.gained, "won")):
            if flips:
                title = f"{task.name}: {len(flips)} of {count} answers {what} by compression"
                found.append(_flips(title, flips))
    return found


def _flips(title: str, flips: Sequence[Flip]) -> Table:
    rows = [
        (
            flip.id,
            ("… " if flip.cut else "") + flip.context_tail,
            " / ".join(flip.choices) or MISSING,
            flip.answer,
            flip.source or MISSING,
            flip.compressed or MISSING,
        )
        for flip in flips
    ]
    return Table(title, ("Item", "Question", "Choices", "Right", "Source", "Compressed"), "llllll", rows)
