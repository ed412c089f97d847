"""Progress where there is no terminal: a line now and then, with the time left by what this process did."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from compress import console


@pytest.mark.parametrize("taken_up", [0, 60])
def test_the_time_left_is_judged_by_work_and_not_by_what_was_taken_up(monkeypatch, taken_up):
    now = [0.0]
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: now[0]))
    text = io.StringIO()
    progress = console.StageProgress(Console(file=text, width=100), interval=10.0)
    with progress.task("recover", taken_up + 40) as advance:
        for _ in range(taken_up):
            now[0] += 1e-6
            advance("going on")
        for _ in range(40):
            now[0] += 2.0
            advance("")
    lines = text.getvalue().splitlines()
    assert lines[0] == "recover: started" and lines[-1] == "recover: done in 1 min 20 s"
    assert lines[1] == f"recover: {taken_up + 5}/{taken_up + 40}, 1 min 10 s left"
