"""Seconds by part of a stage's work."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Clock:
    """`with clock.timed("training")` adds to `seconds["training"]`, which do not nest. `parts` are there at once.

    A GPU's work goes on after its calls return. With its `device` a part is measured between two marks in the queue of
    work, and nobody waits for it before `seconds` is asked for.
    """

    def __init__(self, *parts: str, device: torch.device | None = None) -> None:
        self._seconds = dict.fromkeys(parts, 0.0)
        self._carried: dict[str, float] = {}
        self._gpu = device if device is not None and device.type == "cuda" else None
        self._marks: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @property
    def seconds(self) -> dict[str, float]:
        """By part, up to now, with what was carried over; waits for a GPU to finish what was timed."""
        if self._marks and self._gpu is not None:
            torch.cuda.synchronize(self._gpu)
            for part, first, last in self._marks:
                self.add(part, first.elapsed_time(last) / 1000)
            self._marks.clear()
        parts = dict.fromkeys((*self._carried, *self._seconds))
        return {part: self._carried.get(part, 0.0) + self._seconds.get(part, 0.0) for part in parts}

    def carry(self, seconds: dict[str, float]) -> None:
        """Count what an interrupted run had taken up to a save, in place of what was carried from an earlier save."""
        self._carried = dict(seconds)

    @property
    def carried(self) -> float:
        """Seconds in all that were carried over."""
        return sum(self._carried.values())

    def add(self, part: str, seconds: float) -> None:
        """Count time that was measured otherwise."""
        self._seconds[part] = self._seconds.get(part, 0.0) + seconds

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        if self._gpu is not None:
            first = self._mark()
            try:
                yield
            finally:
                self._marks.append((part, first, self._mark()))
            return
        started = time.perf_counter()
        try:
            yield
        finally:
            self.add(part, time.perf_counter() - started)

    @contextmanager
    def remaining(self, part: str) -> Iterator[None]:
        """Count what passes inside and is not timed there as another part."""
        before, started = sum(self.seconds.values()), time.perf_counter()
        yield
        others = sum(self.seconds.values()) - before
        self.add(part, time.perf_counter() - started - others)

    def _mark(self) -> torch.cuda.Event:
        event: torch.cuda.Event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event
