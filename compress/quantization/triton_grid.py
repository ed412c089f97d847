"""The error of a grid, in one pass over the weights: what the scale search asks for two dozen times.

    error[row, group] = sum_j weights[group, j] (value_j - w_j)^2      value_j = (clamp(round(w_j (1 / s) + z)) - z) s

Torch does it in nine operations, each of which reads and writes a matrix as large as the weights; here they are read
once. One program takes a few groups and walks along their columns.

Example: w = [1.0, 2.2], s = 1, weights 1: codes 1 and 2, error 0.04.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from compress.quantization.grid import Grid
from compress.quantization.triton_columns import whole

NUMBERS = 2048
"""Weights that a program holds at a time."""


def weighted_error(grouped: Tensor, weights: Tensor, grid: Grid) -> Tensor:
    """float32 (rows, groups) of grouped (rows, groups, width) and weights (groups, width), both float32."""
    rows, groups, width = grouped.shape
    grouped, weights = grouped.contiguous(), weights.contiguous()
    error = torch.empty(rows, groups, dtype=torch.float32, device=grouped.device)
    chunk = min(512, triton.next_power_of_2(width))
    items = max(1, NUMBERS // chunk)
    scale = grid.scale.float().contiguous()
    _weighted_error[(triton.cdiv(rows * groups, items),)](
        grouped,
        weights,
        scale,
        # Never read for symmetric grids, but a pointer all the same.
        scale if grid.zero is None else grid.zero.float().contiguous(),
        error,
        rows * groups,
        groups,
        width,
        float(grid.scheme.lowest),
        float(grid.scheme.highest),
        ASYMMETRIC=grid.zero is not None,
        ITEMS=items,
        CHUNK=chunk,
    )
    return error


@triton.jit  # type: ignore[untyped-decorator]
def _weighted_error(
    grouped: tl.tensor,
    weights: tl.tensor,
    scale: tl.tensor,
    zero: tl.tensor,
    error: tl.tensor,
    count: tl.tensor,
    groups: tl.tensor,
    width: tl.tensor,
    lowest: tl.tensor,
    highest: tl.tensor,
    ASYMMETRIC: tl.constexpr,
    ITEMS: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    """grouped (count, width), weights (groups, width), scale, zero, error (count,): float32, as pointers."""
    item = tl.program_id(0) * ITEMS + tl.arange(0, ITEMS)
    real = item < count
    step = tl.load(scale + item, mask=real, other=1.0)[:, None]
    inverse = tl.div_rn(1.0, step)
    shift = tl.load(zero + item, mask=real, other=0.0)[:, None] if ASYMMETRIC else 0.0
    # int64: weights of a large model pass 2^31.
    first = item.to(tl.int64)[:, None] * width
    beside = (item % groups)[:, None] * width
    total = tl.zeros([ITEMS, CHUNK], dtype=tl.float32)
    for start in range(0, width, CHUNK):
        column = start + tl.arange(0, CHUNK)[None, :]
        inside = real[:, None] & (column < width)
        value = tl.load(grouped + first + column, mask=inside, other=0.0)
        importance = tl.load(weights + beside + column, mask=inside, other=0.0)
        code = value * inverse + shift
        code = whole(code, lowest, highest)
        difference = (code - shift) * step - value
        total += importance * difference * difference
    tl.store(error + item, tl.sum(total, axis=1), mask=real)
