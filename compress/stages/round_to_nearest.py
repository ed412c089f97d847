"""Rounding to nearest: every weight goes to the closest value of its grid. Needs no data; the floor to beat.

With `scales: mse` the grid itself is fitted to the weights (range shrunk where that lowers the squared error); with
`minmax` it just covers each group.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from compress.quantization.gptq import rounded
from compress.quantization.grid import Grid
from compress.quantization.scheme import Scheme
from compress.stages.base import StageContext, StageOutcome
from compress.stages.data_free import quantise_each
from compress.stages.quantize import QuantizeStage


class RoundToNearest(QuantizeStage):
    """Round weights to the nearest grid value. Data-free."""

    kind: Literal["round_to_nearest"] = "round_to_nearest"
    scales: Literal["minmax", "mse"] = Field(default="mse", description="how scales are chosen")

    def apply(self, context: StageContext) -> StageOutcome:
        def quantise(weight: Tensor, scheme: Scheme) -> tuple[Tensor, Grid, float]:
            solution = rounded(weight, None, scheme, context.stored, self.scales)
            return solution.codes, solution.grid, solution.error

        return quantise_each(context, self.kind, self.planned(context.source).scheme_of, quantise)
