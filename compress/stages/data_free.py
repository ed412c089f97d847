"""What stages share that read no calibration text: every block in turn, and the record of a linear."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from compress.events import Event
from compress.quantization.scheme import Scheme
from compress.stages.base import StageContext, restore


def each_block(
    context: StageContext, noun: str, work: Callable[[int], dict[str, Any]]
) -> tuple[list[dict[str, Any]], list[Event]]:
    """Write everything outside the blocks, then let `work` write each unfinished block; it returns the block's
    record. Gives the modules and events of all."""
    modules: list[dict[str, Any]] = []
    events: list[Event] = []
    context.output.write_outer(context.source)
    count = context.source.block_count
    with context.progress.task(noun, count) as advance:
        for index in range(count):
            record = context.output.block_record(index)
            if record is None:
                record = work(index)
                context.after_block(index)
            done, happened = restore(record)
            modules += done
            events += happened
            advance(f"block {index + 1}/{count}")
    return modules, events


def record_of(
    module: str, index: int, scheme: Scheme, shape: tuple[int, ...], error: float, seconds: float
) -> dict[str, Any]:
    """A linear's record; `error` is relative, of its weights (rows, columns)."""
    rows, columns = shape
    return {
        "name": module,
        "block": index,
        "scheme": scheme.label,
        "error": error,
        "rounding_error": None,
        "damping": None,
        "seconds": seconds,
        "effective_bits": 8 * scheme.stored_bytes(rows, columns) / (rows * columns),
        "events": [],
    }
