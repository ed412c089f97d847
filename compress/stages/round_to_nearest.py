"""Rounding to nearest: every weight goes to the closest value of its grid. Needs no data; the floor to beat.

With `scales: mse` the grid itself is fitted to the weights (range shrunk where that lowers the squared error); with
`minmax` it just covers each group.
"""

from __future__ import annotations

import time
from typing import Any, Literal

from pydantic import Field

from compress.quantization.gptq import rounded
from compress.stages.base import StageContext, StageOutcome
from compress.stages.data_free import each_block, record_of
from compress.stages.quantize import QuantizeStage


class RoundToNearest(QuantizeStage):
    """Round weights to the nearest grid value. Data-free."""

    kind: Literal["round_to_nearest"] = "round_to_nearest"
    scales: Literal["minmax", "mse"] = Field(default="mse", description="how scales are chosen")

    def apply(self, context: StageContext) -> StageOutcome:
        return self.planned(context.source)._round(context)

    def _round(self, context: StageContext) -> StageOutcome:
        seconds = {"solve": 0.0, "write": 0.0}
        modules, events = each_block(context, "round_to_nearest", lambda index: self._block(context, index, seconds))
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
            records.append(record_of(module, index, scheme, tuple(weight.shape), solution.error, spent))
        started = time.perf_counter()
        record = {"modules": records, "events": [event.to_json() for event in self.kept_events(names)]}
        context.output.write_block(source, index, quantised, record)
        seconds["write"] += time.perf_counter() - started
        return record
