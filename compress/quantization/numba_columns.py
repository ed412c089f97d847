"""The columns of one block of GPTQ, and those of a sweep over codes, in machine code that numba makes for this CPU.

See `quantization.columns` and `quantization.refine` for the arithmetic, `quantization.triton_columns` for the same on a
GPU. In torch a column is a dozen operations of some two microseconds each, however few rows there are; here it is a
loop over rows. That counts where a matrix is solved a few rows at a time (`quantization.row_feedback`): 32 rows of 576
columns take 1.0 ms in place of 10.8.

The operations are torch's, in its order, each rounded for itself (numba fuses nothing on its own); torch may fuse the
update of the columns behind, so a weight that lies between two codes to the last bit of float32 may take either.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from compress.quantization.columns import ColumnGrid

LANES = 128
"""Rows that go through all columns of a block together: of 64 columns 32 KiB, which stay in the cache of a core."""
_STORED = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class _Kernel:
    """A grid as arrays, and how to run a kernel over all rows of a block."""

    def __init__(self, grid: ColumnGrid) -> None:
        self.grid = grid
        self._group = grid.group.numpy()
        self._scale = grid.scale.numpy()
        # Never read for symmetric grids, but an array all the same.
        self._zero = self._scale if grid.zero is None else grid.zero.numpy()

    def _run(self, kernel: Callable[..., None], start: int, *tensors: Tensor) -> None:
        """`kernel` on the block of columns that begins at `start`; its rows on as many threads as torch has."""
        grid, (count, rows) = self.grid, tensors[0].shape
        arrays: list[Any] = [*(each.numpy() for each in tensors), self._group[start : start + count]]
        arrays += [self._scale, self._zero]
        numbers = (np.float32(grid.lowest), np.float32(grid.highest), grid.zero is not None, _STORED[grid.stored])

        def part(first: int) -> None:
            kernel(*arrays, first, min(first + LANES, rows), *numbers)

        starts = range(0, rows, LANES)
        threads = min(torch.get_num_threads(), len(starts))
        if threads == 1:
            for first in starts:
                part(first)
            return
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(part, starts))


class NumbaRounder(_Kernel):
    """A `BlockRounder` for tensors in host memory."""

    def round_block(self, start: int, tile: Tensor, corner: Tensor, codes: Tensor, errors: Tensor) -> None:
        self._run(_round_block, start, tile, corner, codes, errors)


class NumbaSweeper(_Kernel):
    """A `BlockSweeper`, likewise."""

    def sweep_block(
        self, start: int, tile: Tensor, corner: Tensor, value: Tensor, codes: Tensor, moved: Tensor
    ) -> None:
        self._run(_sweep_block, start, tile, corner, value, codes, moved)


def _compiled(function: Callable[..., None]) -> Callable[..., None]:
    """Machine code of `function`, made when it is first called and kept beside this file where that can be written."""
    options = {"nogil": True, "error_model": "numpy"}
    try:
        return numba.njit(cache=True, **options)(function)  # type: ignore[no-any-return]
    except RuntimeError:  # numba finds no folder for its cache
        return numba.njit(**options)(function)  # type: ignore[no-any-return]


@numba.njit(inline="always")  # type: ignore[untyped-decorator]
def _as_stored(values: Any, raw: Any, stored: int) -> None:
    """float32 values, and the same memory as int32, rounded to the stored dtype in place, half to even.

    float16: 13 bits are dropped; below its smallest normal number the distance of its numbers is 2^-24, which is that
    of float32's around 0.75.
    """
    if stored == 1:
        for r in range(len(values)):
            small = (values[r] + np.float32(0.75)) - np.float32(0.75)
            tiny = abs(values[r]) < np.float32(2.0**-14)
            bits = raw[r]
            bits = (bits + 0x0FFF + ((bits >> 13) & 1)) & ~0x1FFF
            raw[r] = bits
            if tiny:
                values[r] = small
            if abs(values[r]) > np.float32(65504.0):
                values[r] = np.float32(np.inf) if values[r] > 0 else np.float32(-np.inf)
    elif stored == 2:
        for r in range(len(values)):
            bits = raw[r]
            raw[r] = (bits + 0x7FFF + ((bits >> 16) & 1)) & ~0xFFFF


@numba.njit(inline="always")  # type: ignore[untyped-decorator]
def _onto_grid(
    value: Any, raw: Any, codes: Any, steps: Any, shift: Any, lowest: Any, highest: Any, asymmetric: bool, stored: int
) -> None:
    """`value` (rows,), what a column is to be in steps of its scales, `raw` the same memory: becomes the value of the
    nearest code, which is written."""
    for r in range(len(value)):
        found = value[r]
        if asymmetric:
            found += shift[r]
        found = min(max(np.rint(found), lowest), highest)
        codes[r] = np.int8(found)
        if asymmetric:
            found -= shift[r]
        value[r] = found * steps[r]
    _as_stored(value, raw, stored)


@_compiled
def _round_block(
    tile: Any, corner: Any, codes: Any, errors: Any, group: Any, scale: Any, zero: Any,
    first: int, last: int, lowest: Any, highest: Any, asymmetric: bool, stored: int,
) -> None:  # fmt: skip
    """Arguments of `BlockRounder.round_block`, rows `first` to `last` - 1 of them. tile, errors (columns, rows), corner
    (columns, columns) and scale, zero (groups, rows) float32; group (columns,) int64; codes (columns, rows) int8."""
    count, width = len(tile), last - first
    error, value = np.empty(width, np.float32), np.empty(width, np.float32)
    raw = value.view(np.int32)
    one = np.float32(1)
    for j in range(count):
        target, steps, shift = tile[j, first:last], scale[group[j], first:last], zero[group[j], first:last]
        pivot = corner[j, j]
        for r in range(width):
            value[r] = target[r] * (one / steps[r])
        _onto_grid(value, raw, codes[j, first:last], steps, shift, lowest, highest, asymmetric, stored)
        for r in range(width):
            error[r] = (target[r] - value[r]) / pivot
            errors[j, first + r] = error[r]
        for k in range(j + 1, count):
            share = corner[j, k]
            for r in range(width):
                tile[k, first + r] -= share * error[r]


@_compiled
def _sweep_block(
    tile: Any, corner: Any, values: Any, codes: Any, moved: Any, group: Any, scale: Any, zero: Any,
    first: int, last: int, lowest: Any, highest: Any, asymmetric: bool, stored: int,
) -> None:  # fmt: skip
    """Arguments of `BlockSweeper.sweep_block`, in the layouts of `_round_block`; values, moved (columns, rows)."""
    count, width = len(tile), last - first
    change, value = np.empty(width, np.float32), np.empty(width, np.float32)
    raw = value.view(np.int32)
    for j in range(count):
        left, steps, shift = tile[j, first:last], scale[group[j], first:last], zero[group[j], first:last]
        pivot = corner[j, j]
        for r in range(width):
            value[r] = (values[j, first + r] - left[r] / pivot) / steps[r]
        _onto_grid(value, raw, codes[j, first:last], steps, shift, lowest, highest, asymmetric, stored)
        for r in range(width):
            change[r] = value[r] - values[j, first + r]
            moved[j, first + r] = change[r]
            values[j, first + r] = value[r]
        for k in range(j + 1, count):
            share = corner[j, k]
            for r in range(width):
                tile[k, first + r] += share * change[r]
