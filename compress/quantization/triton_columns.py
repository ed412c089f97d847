"""The columns of one block of GPTQ, rounded by one Triton kernel; and those of a sweep over codes that are there.

See `quantization.columns` and `quantization.refine` for the arithmetic. Both kernels have one shape:

    tile (n, rows)          one program takes 32 rows and all n columns, and keeps them in registers

       rows ->
    c  [ . . | . . | . . ]  for j = 0 .. n - 1:
    o  [ . . | . . | . . ]      take column j out of the tile: a sum over a tile that is zero elsewhere
    l  [ . . | . . | . . ]      round it, write codes and errors
    |  [ . . | . . | . . ]      subtract error x U_j from what is left of the tile

Launching a dozen torch operations for every column costs a GPU far more than the arithmetic; here a block is one
launch. A program is one warp, a lane for each row, so that no step waits for another warp. Blocks of 64 or 128
columns fit its registers.

The result is meant to equal torch's to the last bit but for the one fused step, so the compiler may not fuse on its
own (`enable_fp_fusion=False`), division is the correctly rounded one, and the subtraction of the error is written as
an explicit fused multiply-add.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from compress.quantization.columns import ColumnGrid

ROWS = 32
"""Rows of a program. With 64 columns that are 64 float32 registers for each of 32 threads, of 255 there are."""
OPTIONS = {"num_warps": 1, "enable_fp_fusion": False}
_STORED = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


class TritonRounder:
    """A `BlockRounder` for tensors on a GPU, or on the CPU where triton was imported with TRITON_INTERPRET=1."""

    def __init__(self, grid: ColumnGrid) -> None:
        self.grid = grid

    def round_block(self, start: int, tile: Tensor, corner: Tensor, codes: Tensor, errors: Tensor) -> None:
        _launch(_round_block, self.grid, start, tile, corner, codes, errors)


class TritonSweeper:
    """A `BlockSweeper`, likewise."""

    def __init__(self, grid: ColumnGrid) -> None:
        self.grid = grid

    def sweep_block(
        self, start: int, tile: Tensor, corner: Tensor, value: Tensor, codes: Tensor, moved: Tensor
    ) -> None:
        _launch(_sweep_block, self.grid, start, tile, corner, value, codes, moved)


def _launch(kernel: Any, grid: ColumnGrid, start: int, tile: Tensor, corner: Tensor, *written: Tensor) -> None:
    """Run one of the kernels below on the block of columns that begins at `start`."""
    count, rows = tile.shape
    kernel[(triton.cdiv(rows, ROWS),)](
        tile,
        corner,
        grid.group[start : start + count],
        grid.scale,
        # Never read for symmetric grids, but a pointer all the same.
        grid.scale if grid.zero is None else grid.zero,
        *written,
        rows,
        count,
        float(grid.lowest),
        float(grid.highest),
        ASYMMETRIC=grid.zero is not None,
        STORED=_STORED[grid.stored],
        ROWS=ROWS,
        COLUMNS=triton.next_power_of_2(count),
        **OPTIONS,
    )


@triton.jit  # type: ignore[untyped-decorator]
def _as_stored(value: tl.tensor, STORED: tl.constexpr) -> tl.tensor:
    """float32 values rounded to the stored dtype."""
    if STORED == "fp16":
        value = value.to(tl.float16).to(tl.float32)
    if STORED == "bf16":
        # By hand, half to even: the interpreter's conversion cuts the lower half off.
        raw = value.to(tl.uint32, bitcast=True)
        raw = (raw + 0x7FFF + ((raw >> 16) & 1)) & 0xFFFF0000
        value = raw.to(tl.float32, bitcast=True)
    return value


@triton.jit  # type: ignore[untyped-decorator]
def whole(code: tl.tensor, lowest: tl.tensor, highest: tl.tensor) -> tl.tensor:
    """The nearest whole number within bounds, half to even.

    The bounds are whole, so clamping first is the same, and makes the number small enough for what follows: above 2^23
    float32 has whole numbers only, so adding 1.5 * 2^23 rounds half to even, and subtracting it is exact. Triton's own
    round is not to be had on every device.
    """
    code = tl.minimum(tl.maximum(code, lowest), highest)
    return (code + 12582912.0) - 12582912.0


@triton.jit  # type: ignore[untyped-decorator]
def _round_block(
    tile: tl.tensor,
    corner: tl.tensor,
    group: tl.tensor,
    scale: tl.tensor,
    zero: tl.tensor,
    codes: tl.tensor,
    errors: tl.tensor,
    rows: tl.tensor,
    count: tl.tensor,
    lowest: tl.tensor,
    highest: tl.tensor,
    ASYMMETRIC: tl.constexpr,
    STORED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Arguments of `BlockRounder.round_block`, all contiguous, as pointers.

    tile, errors (count, rows), corner (count, count) and scale, zero (groups, rows) float32; group (count,) int64;
    codes (count, rows) int8.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    real = row < rows
    inside = (column < count)[:, None] & real[None, :]
    work = tl.load(tile + column[:, None] * rows + row[None, :], mask=inside, other=0.0)
    for j in range(count):
        # int64: groups times rows passes 2^31 in the head of a large model.
        start = tl.load(group + j) * rows
        step = tl.load(scale + start + row, mask=real, other=1.0)
        target = tl.sum(tl.where((column == j)[:, None], work, 0.0), axis=0)
        code = target * tl.div_rn(1.0, step)
        if ASYMMETRIC:
            shift = tl.load(zero + start + row, mask=real, other=0.0)
            code += shift
        code = whole(code, lowest, highest)
        tl.store(codes + j * rows + row, code.to(tl.int8), mask=real)
        if ASYMMETRIC:
            code -= shift
        value = _as_stored(code * step, STORED)
        error = tl.div_rn(target - value, tl.load(corner + j * count + j))
        tl.store(errors + j * rows + row, error, mask=real)
        later = tl.load(corner + j * count + column, mask=(column > j) & (column < count), other=0.0)
        work = tl.fma(-error[None, :], later[:, None], work)


@triton.jit  # type: ignore[untyped-decorator]
def _sweep_block(
    tile: tl.tensor,
    corner: tl.tensor,
    group: tl.tensor,
    scale: tl.tensor,
    zero: tl.tensor,
    values: tl.tensor,
    codes: tl.tensor,
    moved: tl.tensor,
    rows: tl.tensor,
    count: tl.tensor,
    lowest: tl.tensor,
    highest: tl.tensor,
    ASYMMETRIC: tl.constexpr,
    STORED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Arguments of `BlockSweeper.sweep_block` as pointers, in the layouts of `_round_block`; values (count, rows)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    real = row < rows
    inside = (column < count)[:, None] & real[None, :]
    work = tl.load(tile + column[:, None] * rows + row[None, :], mask=inside, other=0.0)
    for j in range(count):
        start = tl.load(group + j) * rows
        step = tl.load(scale + start + row, mask=real, other=1.0)
        residual = tl.sum(tl.where((column == j)[:, None], work, 0.0), axis=0)
        before = tl.load(values + j * rows + row, mask=real, other=0.0)
        code = tl.div_rn(before - tl.div_rn(residual, tl.load(corner + j * count + j)), step)
        if ASYMMETRIC:
            shift = tl.load(zero + start + row, mask=real, other=0.0)
            code += shift
        code = whole(code, lowest, highest)
        tl.store(codes + j * rows + row, code.to(tl.int8), mask=real)
        if ASYMMETRIC:
            code -= shift
        value = _as_stored(code * step, STORED)
        change = value - before
        tl.store(values + j * rows + row, value, mask=real)
        tl.store(moved + j * rows + row, change, mask=real)
        later = tl.load(corner + j * count + column, mask=(column > j) & (column < count), other=0.0)
        work = tl.fma(change[None, :], later[:, None], work)
