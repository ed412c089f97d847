"""Rounding to nearest: every weight goes to the closest value of its grid. Needs no data; the floor to beat.

With `scales: mse` the grid itself is fitted to the weights (range shrunk where that lowers the squared error); with
`minmax` it just covers each group.
"""

from __future__ import annotations

import time
from typing import Any, Literal

from pydantic import Field

from compress.quantization.gptq import rounded
from compress.stages.base import StageContext, StageOutcome, restore
from compress.stages.quantize import QuantizeStage


class RoundToNearest(QuantizeStage):
    """Round weights to the nearest grid value. Data-free."""

    kind: Literal["round_to_nearest"] = "round_to_nearest"
    scales: Literal["minmax", "mse"] = Field(default="mse", description="how scales are chosen")

    def apply(self, context: StageContext) -> StageOutcome:
        return self.planned(context.source)._round(context)

    def _round(self, context: StageContext) -> StageOutcome:
        source, output = context.source, context.output
        arch = source.architecture
        count = 1 + max(index for name in source.names if (index := arch.block_index(name)) is not None)
        modules, events, seconds = [], [], {"solve": 0.0, "write": 0.0}
        output.write_outer(source)
        with context.progress.task("round_to_nearest", count) as advance:
            for index in range(count):
                record = output.block_record(index)
                if record is None:
                    record = self._block(context, index, seconds)
                    context.after_block(index)
                done, happened = restore(record)
                modules += done
                events += happened
                advance(f"block {index + 1}/{count}")
        return StageOutcome(modules, events, seconds)

    def _block(self, context: StageContext, index: int, seconds: dict[str, float]) -> dict[str, Any]:
        source = context.source
        prefix = source.architecture.block_name(index)
        names = [f"{prefix}.{name}" for name in source.architecture.linears]
        quantised, records = {}, []
        for module in names:
            scheme = self.scheme_of(module)
            if scheme is None:
                continue
            started = time.perf_counter()
            weight = source.matrix(module).to(context.device).float()
            solution = rounded(weight, None, scheme, context.stored, self.scales)
            quantised[module] = (solution.codes, solution.grid)
            spent = time.perf_counter() - started
            seconds["solve"] += spent
            rows, columns = weight.shape
            bits = 8 * scheme.stored_bytes(rows, columns) / (rows * columns)
            records.append(
                {
                    "name": module,
                    "block": index,
                    "scheme": scheme.label,
                    "error": solution.error,
                    "rounding_error": None,
                    "damping": None,
                    "seconds": spent,
                    "effective_bits": bits,
                    "events": [],
                }
            )
        started = time.perf_counter()
        record = {"modules": records, "events": [event.to_json() for event in self.kept_events(names)]}
        context.output.write_block(source, index, quantised, record)
        seconds["write"] += time.perf_counter() - started
        return record
