"""The column loop of GPTQ: codes one column at a time, each error spread over the columns that come later.

For column j in the given order, with s, z the scale and zero point of the group it came from (see `quantization.gptq`
for U and the order):

    code_j  = round(w_j / s + z), half to even, clamped to the scheme's range
    error_j = (w_j - value_j) / U_jj        value_j = (code_j - z) s, rounded to the stored dtype as a loader does
    w_k    -= U_jk error_j                  for all k > j

Example, one row, s = 1, U = [[1, 0.5], [0, 1]]: w = [0.4, 0.6] gives code_0 = 0 and error_0 = 0.4; then w_1 = 0.6 - 0.2
and code_1 = 0.

Only the columns of one block are brought up to date after every column. The columns behind it wait for the block's
errors and take them as one product; with two levels (blocks of 64 inside spans of 512) the columns behind a span wait
for all of it, so that the product that moves most memory sums over 512 columns at once. Everything runs on the
transpose (columns, rows), where a column is contiguous.

Rounding the columns of a block is done by torch, some twelve small operations a column, or by one call of compiled code
a block: on a GPU Triton's (`quantization.triton_columns`), on a CPU numba's (`quantization.numba_columns`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal, Protocol

import torch
from torch import Tensor

from compress.quantization.gpu import add_product, gpu_kernels
from compress.quantization.grid import Grid

Kernel = Literal["torch", "numba", "triton"]
SPAN = 512
"""Columns whose errors reach those behind them in one product, with two levels."""


@dataclass(frozen=True)
class ColumnGrid:
    """A grid laid out for columns that are taken in any order."""

    scale: Tensor
    """(groups, rows) float32: the values of the stored scales."""
    zero: Tensor | None
    """(groups, rows) float32, None for symmetric schemes."""
    group: Tensor
    """(columns,) int64: the group of each column, in the order of processing."""
    lowest: int
    highest: int
    stored: torch.dtype
    """The dtype that values are rounded to."""

    @classmethod
    def of(cls, grid: Grid, order: Tensor) -> ColumnGrid:
        """`grid` of a matrix whose columns are taken in `order` (columns,) int64."""
        scheme = grid.scheme
        return cls(
            scale=grid.scale.T.float().contiguous(),
            zero=None if grid.zero is None else grid.zero.T.float().contiguous(),
            group=order // scheme.width(len(order)),
            lowest=scheme.lowest,
            highest=scheme.highest,
            stored=grid.scale.dtype,
        )


class BlockRounder(Protocol):
    """Rounds the columns of one block."""

    def __init__(self, grid: ColumnGrid) -> None: ...

    def round_block(self, start: int, tile: Tensor, corner: Tensor, codes: Tensor, errors: Tensor) -> None:
        """Columns `start` and following in the order of processing, n of them; rows are independent.

        tile (n, rows) float32, what is to be rounded, is scratch afterwards; corner (n, n) float32 is U's, contiguous;
        written are codes (n, rows) int8 and errors (n, rows) float32, both contiguous.
        """


def column_kernel(device: torch.device) -> Kernel:
    """What rounds columns on `device`: Triton on a GPU, numba on a CPU, torch where that one is not installed."""
    if device.type == "cpu":
        return "numba" if has_numba() else "torch"
    return "triton" if gpu_kernels(device) else "torch"


@cache
def has_numba() -> bool:
    """Whether numba is installed and imports: it may not know the newest numpy."""
    try:
        import numba  # noqa: F401
    except ImportError:
        return False
    return True


def solve_columns(
    weight: Tensor,
    order: Tensor,
    upper: Tensor,
    grid: Grid,
    block: int = 64,
    kernel: Kernel | None = None,
) -> Tensor:
    """Codes (rows, columns) int8 of `weight` (rows, columns) float32 on its grid, with feedback.

    order (columns,) int64: the columns in the order of processing; upper: U (columns, columns) float32 in that order.
    `kernel` None takes what `column_kernel` names. The kernels do the same arithmetic; where they sum in another order,
    or the block is another, a weight that lies between two codes to the last bit of float32 may take either.
    """
    kernel = kernel or column_kernel(weight.device)
    rounder = _rounder(kernel)(ColumnGrid.of(grid, order))
    work = weight.T[order].contiguous()
    codes = torch.empty_like(work, dtype=torch.int8)
    for here, corner, errors in blocks_of(work, upper, block, kernel, -1):
        rounder.round_block(here.start, work[here], corner, codes[here], errors)
    result = torch.empty_like(codes)
    result[order] = codes
    return result.T.contiguous()


def blocks_of(
    work: Tensor, matrix: Tensor, block: int, kernel: Kernel, sign: int
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Go along the columns of `work` (columns, rows) block by block, and spread what each block writes over the rest.

    Gives (the block's columns, their corner of `matrix` (columns, columns), an empty tensor (block, rows)). What the
    caller writes into the last, e, reaches every column k behind the block: work_k += sign sum_j matrix_jk e_j.
    """
    columns = len(work)
    # Torch spends its time inside blocks: a second level saves it less than a tenth (3072 x 1536 on one core).
    span = max(block, SPAN // block * block) if kernel == "triton" else block
    written = torch.empty_like(work[: min(span, columns)])
    for first in range(0, columns, span):
        last = min(first + span, columns)
        for start in range(first, last, block):
            stop = min(start + block, last)
            here, now = slice(start, stop), written[start - first : stop - first]
            yield here, matrix[here, here].contiguous(), now
            if stop < last:
                work[stop:last].addmm_(matrix[here, stop:last].T, now, alpha=sign)
        if last < columns:
            add_product(work[last:], matrix[first:last, last:].T, written[: last - first], sign)


def _rounder(kernel: Kernel) -> type[BlockRounder]:
    if kernel == "torch":
        return TorchRounder
    if kernel == "numba":
        from compress.quantization.numba_columns import NumbaRounder

        return NumbaRounder
    from compress.quantization.triton_columns import TritonRounder

    return TritonRounder


class TorchRounder:
    """The loop in torch operations. On the CPU their fixed cost is most of the time, so nothing is allocated twice."""

    def __init__(self, grid: ColumnGrid) -> None:
        self.grid = grid
        self.group = grid.group.tolist()
        self.scale, self.inverse = grid.scale.unbind(), grid.scale.reciprocal().unbind()
        self.zero = None if grid.zero is None else grid.zero.unbind()
        self.value = torch.empty_like(grid.scale[0])
        self.rounded = torch.empty_like(self.value, dtype=grid.stored)

    def round_block(self, start: int, tile: Tensor, corner: Tensor, codes: Tensor, errors: Tensor) -> None:
        grid, value, count = self.grid, self.value, len(tile)
        exact = torch.empty_like(tile)
        # Dividing by a tensor without dimensions is twice as fast as by a Python number, which is wrapped each time.
        columns = zip(tile.unbind(), exact.unbind(), errors.unbind(), corner.diagonal().unbind(), strict=True)
        for j, (target, code, error, pivot) in enumerate(columns):
            group = self.group[start + j]
            torch.mul(target, self.inverse[group], out=code)
            if self.zero is None:
                code.round_().clamp_(grid.lowest, grid.highest)
                torch.mul(code, self.scale[group], out=value)
            else:
                code.add_(self.zero[group]).round_().clamp_(grid.lowest, grid.highest)
                torch.sub(code, self.zero[group], out=value).mul_(self.scale[group])
            self.rounded.copy_(value)
            torch.sub(target, self.rounded, out=error).div_(pivot)
            if j + 1 < count:
                tile[j + 1 :].addr_(corner[j, j + 1 :], error, alpha=-1)
        codes.copy_(exact)
