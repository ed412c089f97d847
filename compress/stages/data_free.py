"""What stages share that quantise without calibration text: every linear of every block, from its weight alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from torch import Tensor

from compress.events import Event
from compress.quantization.grid import Grid
from compress.quantization.scheme import Scheme
from compress.stages.base import StageContext, StageOutcome, restore

Quantise = Callable[[Tensor, Scheme], tuple[Tensor, Grid, float]]
"""Of a weight (rows, columns) float32: codes int8, their grid, and the error relative to the weight."""


def quantise_each(
    context: StageContext, noun: str, scheme_of: Callable[[str], Scheme | None], quantise: Quantise
) -> StageOutcome:
    """Quantise every linear that `scheme_of` gives a scheme, block by block; a finished block is not done again."""
    modules: list[dict[str, Any]] = []
    events: list[Event] = []
    seconds = {"solve": 0.0, "write": 0.0}
    context.output.write_outer(context.source)
    count = context.source.block_count
    with context.progress.task(noun, count) as advance:
        for index in range(count):
            record = context.output.block_record(index)
            if record is None:
                record = _block(context, index, scheme_of, quantise, seconds)
                context.after_block(index)
            done, happened = restore(record)
            modules += done
            events += happened
            advance(f"block {index + 1}/{count}")
    return StageOutcome(modules, events, seconds)


def _block(
    context: StageContext,
    index: int,
    scheme_of: Callable[[str], Scheme | None],
    quantise: Quantise,
    seconds: dict[str, float],
) -> dict[str, Any]:
    """Write one block; returns its record. Linears without a scheme are kept, with an event each."""
    arch = context.source.architecture
    quantised, records, events = {}, [], []
    for name in arch.linears:
        module = f"{arch.block_name(index)}.{name}"
        scheme = scheme_of(module)
        if scheme is None:
            events.append(kept(module))
            continue
        started = time.perf_counter()
        weight = context.source.matrix(module).to(context.device).float()
        codes, grid, error = quantise(weight, scheme)
        quantised[module] = codes, grid
        spent = time.perf_counter() - started
        seconds["solve"] += spent
        records.append(module_record(module, index, scheme, tuple(weight.shape), error, spent))
    started = time.perf_counter()
    record = {"modules": records, "events": [event.to_json() for event in events]}
    context.output.write_block(context.source, index, quantised, record)
    seconds["write"] += time.perf_counter() - started
    return record


def kept(module: str) -> Event:
    """That a linear stays in its source precision."""
    return Event("module_kept", module, "left in its source precision, by the recipe or its plan")


def module_record(
    module: str, index: int | None, scheme: Scheme, shape: tuple[int, ...], error: float | None, seconds: float
) -> dict[str, Any]:
    """What the report says of a matrix with no more than an error, None if nobody measured it. `index`: its block,
    None outside of blocks."""
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
