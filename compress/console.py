"""The only user of rich: progress, tables, bytes in GiB. Progress and messages go to stderr, results to stdout."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

PIPE_WIDTH = 140
"""Columns of a table where there is no terminal to ask."""
out = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else PIPE_WIDTH)
err = Console(stderr=True, highlight=False, soft_wrap=True)

TAKEN_UP = 2e-5
"""Seconds under which a step was no work of this process."""
COLOURS = {"passed": "green", "failed": "red", "inconclusive": "yellow"}


def bytes_text(count: float | None) -> str:
    """1536 -> '1.5 KiB'; None -> '-'."""
    if count is None:
        return "-"
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def seconds_text(seconds: float) -> str:
    """75 -> '1 min 15 s'."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def print_json(value: Any) -> None:
    """One JSON document on stdout, and nothing else there."""
    sys.stdout.write(json.dumps(value, indent=2, default=str) + "\n")
    sys.stdout.flush()  # what cannot be written is to be known now


def print_json_rows(rows: Sequence[Any]) -> None:
    """A list as one JSON document, a row a line: thousands of rows take a tenth of the time of `print_json`."""
    body = ",\n".join(json.dumps(row, default=str) for row in rows)
    sys.stdout.write(f"[\n{body}\n]\n" if rows else "[]\n")
    sys.stdout.flush()


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on stdout; cells are plain text, whatever they contain."""
    table = Table(title=Text(title), title_justify="left", title_style="bold", box=None, pad_edge=False)
    for column in columns:
        table.add_column(Text(column, style="bold"), overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    out.print(table)


def print_verdict(verdict: str, sentence: str) -> None:
    out.print(Text(verdict.upper(), style=f"bold {COLOURS.get(verdict, '')}"), Text(sentence))


def print_line(text: str = "") -> None:
    out.print(Text(text))


def print_text(text: str) -> None:
    """A document on stdout as it is, and nothing else there."""
    sys.stdout.write(text)


def note(text: str) -> None:
    """A message on stderr."""
    err.print(Text(text))


def print_commands(lines: Sequence[str]) -> None:
    """Workflow commands of a CI system: on stderr, a line each, as they are."""
    sys.stderr.write("".join(f"{line}\n" for line in lines))
    sys.stderr.flush()


def print_error(text: str) -> None:
    """An error on stderr, each line as it is."""
    err.print(Text("error: ", style="bold red") + Text(text))


def before_after(source: Mapping[str, float], compressed: Mapping[str, float]) -> list[list[str]]:
    """Rows of the before/after table: every measurement of the compressed model."""
    rows = []
    for name, value in sorted(compressed.items()):
        before = source.get(name)
        ratio = f"{value / before:.3f}" if before else ""
        rows.append([name, _value(name, before), _value(name, value), ratio])
    return rows


def _value(name: str, value: float | None) -> str:
    if value is None:
        return ""
    return bytes_text(value) if name.endswith("bytes") else f"{value:.5g}"


class StageProgress:
    """Progress on stderr: stage, block, time left. On a terminal a bar; elsewhere a line every few seconds."""

    def __init__(self, console: Console = err, interval: float = 10.0) -> None:
        self.console, self.interval = console, interval

    @contextmanager
    def task(self, label: str, total: int) -> Iterator[Callable[[str], None]]:
        """Progress of `total` units under `label`; yields `advance(note)`."""
        shown = self._bar(label, total) if self.console.is_terminal else self._lines(label, total)
        with shown as advance:
            yield advance

    @contextmanager
    def _bar(self, label: str, total: int) -> Iterator[Callable[[str], None]]:
        columns = (
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console, transient=False) as progress:
            task = progress.add_task(label, total=total, note="")

            def advance(note: str = "") -> None:
                progress.update(task, advance=1, note=note)

            yield advance

    @contextmanager
    def _lines(self, label: str, total: int) -> Iterator[Callable[[str], None]]:
        started = last = before = time.monotonic()
        done = worked = 0
        self.console.print(Text(f"{label}: started"))

        def advance(note: str = "") -> None:
            nonlocal done, worked, last, before
            done += 1
            now = time.monotonic()
            # What an interrupted run had done is counted in a moment, and says nothing of how long the rest takes.
            worked += now - before > TAKEN_UP
            before = now
            if now - last >= self.interval and done < total:
                last = now
                left = (now - started) / max(1, worked) * (total - done)
                self.console.print(Text(f"{label}: {note or f'{done}/{total}'}, {seconds_text(left)} left"))

        yield advance
        self.console.print(Text(f"{label}: done in {seconds_text(time.monotonic() - started)}"))
