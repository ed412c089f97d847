"""After GPTQ: fit all scales of a row together, go over the codes once more, fit again.

GPTQ settles a column for good before it knows what the later ones will do, and its scales were chosen before any code.
Both can be revisited with the same Hessian H, for row w* (the target), codes z (zero points taken off) and scales s:

scales   value = sum_g s_g z_g, with z_g the codes of group g and zeros elsewhere, is linear in s: least squares gives
         (A + mu diag A) (s - s_0) = -c,   A_gh = z_g H z_h,   c_g = z_g H (value_0 - w*)     (G x G for each row)
         (of K-quants d_s, one a super-block, with z_s the codes times their groups' integers; minima stay)
codes    cyclic coordinate descent: with R = (value - w*) H, column j is best at value_j - R_j / H_jj; take the nearest
         code and bring R up to date, columns in descending diag H. Never increases (value - w*) H (value - w*).

Less error on the calibration tokens may be more on others: the caller accepts a refinement only where a Hessian that
it was not computed from agrees. Sources: CDQuant (arXiv 2406.17542), QuantEase (2309.01885); the joint fit of scales
replaces the coordinate descent of Two-Stage (2602.02126).

Example, one row, one group, H = I, w* = [1.0, 2.2], z = [1, 2]: s = (1 x 1 + 2 x 2.2) / (1 + 4) = 1.08.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from compress.quantization.columns import ColumnGrid, Kernel, blocks_of, column_kernel
from compress.quantization.gpu import fine_product, gpu_kernels, judging
from compress.quantization.grid import Grid, dequantize

MU = 0.05
"""Pull of the fitted scales towards the old ones, fraction of diag A."""
SYSTEM_NUMBERS = 1 << 22
"""Numbers in the G x G systems that are solved together: with many groups, few rows at a time."""
GPU_SYSTEM_NUMBERS = 1 << 28
"""The same on a GPU: 1 GiB."""
BLOCK = 64
"""Columns between two products that bring R up to date."""


@dataclass(frozen=True)
class Split:
    """Hessians over disjoint tokens, float32 (columns, columns)."""

    fitted: Tensor
    """Refinements are computed from this one."""
    held_out: Tensor
    """And judged by this one."""


@dataclass(frozen=True)
class Swept:
    """H (columns, columns) float32, positive definite (damped), and the same in the order that a sweep takes."""

    hessian: Tensor
    order: Tensor
    """(columns,) int64: by descending diag H."""
    ordered: Tensor

    @classmethod
    def of(cls, hessian: Tensor) -> Swept:
        order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
        return cls(hessian, order, hessian[order][:, order])


def refined(target: Tensor, codes: Tensor, grid: Grid, swept: Swept, rounds: int = 1) -> tuple[Tensor, Grid]:
    """Codes int8 (rows, columns) and grid with no more error tr[(V - W*) H (V - W*)^T] than the given ones.

    target W* (rows, columns) float32.
    """
    fit = _fit(target, codes, grid, swept.hessian)
    for number in range(rounds):
        codes = descended(target, codes, fit.grid, swept, fit.residual)
        fit = _fit(target, codes, fit.grid, swept.hessian, fine=number < rounds - 1)
    return codes, fit.grid


def fitted_scales(target: Tensor, codes: Tensor, grid: Grid, hessian: Tensor) -> Grid:
    """The grid with each row's scales fitted together, cast to the stored dtype. A row that gains nothing keeps its."""
    return _fit(target, codes, grid, hessian).grid


@dataclass(frozen=True)
class _Fit:
    grid: Grid
    residual: Tensor
    """R = (V - W*) H (rows, columns) of the codes on that grid."""


def _fit(target: Tensor, codes: Tensor, grid: Grid, hessian: Tensor, fine: bool = True) -> _Fit:
    """As `fitted_scales`. With t = s - s_0 the equations are (A + mu diag A) t = -c, c_g = z_g . R_g: what is left of R
    after GPTQ is small, and in it small differences count. A GPU computes it in TF32 where it is not `fine`."""
    old = dequantize(codes, grid).float() - target
    residual = _product(old, hessian, fine)
    fitted = _jointly(codes, grid, hessian, residual)
    candidate = grid.with_free_scales(torch.where(torch.isfinite(fitted), fitted, grid.free_scales.float()))
    new = dequantize(codes, candidate).float() - target
    other = _product(new, hessian, fine)
    better = ((other * new).sum(-1) < (residual * old).sum(-1)).unsqueeze(1)
    scales = torch.where(better, candidate.free_scales, grid.free_scales)
    return _Fit(grid.with_free_scales(scales.float()), torch.where(better, other, residual))


def _product(rows: Tensor, hessian: Tensor, fine: bool) -> Tensor:
    if fine:
        return fine_product(rows, hessian)
    with judging(rows.device):
        return rows @ hessian


def _jointly(codes: Tensor, grid: Grid, hessian: Tensor, residual: Tensor) -> Tensor:
    """Fitted `free_scales` float32 (rows, groups); NaN where a row's equations cannot be solved."""
    rows, groups = grid.free_scales.shape
    step = max(1, (GPU_SYSTEM_NUMBERS if codes.is_cuda else SYSTEM_NUMBERS) // groups**2)
    fitted = grid.free_scales.to(torch.float32, copy=True)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        integers = grid.at(part).multiples(codes[part])
        matrices = moments(integers, hessian)
        slopes = (residual[part].view(integers.shape) * integers).sum(-1)
        diagonal = matrices.diagonal(dim1=1, dim2=2)
        # A group whose codes are all zero has no say, and keeps its scale.
        excited = diagonal > 0
        diagonal.add_(MU * diagonal + ~excited)
        fitted[part] -= torch.where(excited, _solved(matrices, slopes), 0.0)
    return fitted


def moments(integers: Tensor, hessian: Tensor) -> Tensor:
    """A (rows, groups, groups) float32 of integers z (rows, groups, width) int16: lower triangles, zero above, which is
    all that a Cholesky factorisation reads."""
    rows, groups, width = integers.shape
    if gpu_kernels(integers.device):
        from compress.quantization import triton_moments

        if width in triton_moments.WIDTHS:
            return triton_moments.moments(integers, hessian)
    values = integers.float()
    found = torch.zeros(rows, groups, groups, device=integers.device)
    with judging(integers.device):
        for group in range(groups):
            columns = slice(group * width, (group + 1) * width)
            product = (values[:, group] @ hessian[columns, group * width :]).view(rows, groups - group, width)
            found[:, group:, group] = product.mul_(values[:, group:]).sum(-1)
    return found


def _solved(matrices: Tensor, right: Tensor) -> Tensor:
    """Solutions (rows, groups) of symmetric systems; NaN where one is not definite."""
    lower, failed = torch.linalg.cholesky_ex(matrices)
    solution = torch.cholesky_solve(right.unsqueeze(-1), lower).squeeze(-1)
    return torch.where(failed.unsqueeze(1) == 0, solution, torch.nan)


class BlockSweeper(Protocol):
    """Revisits the codes of the columns of one block."""

    def __init__(self, grid: ColumnGrid) -> None: ...

    def sweep_block(
        self, start: int, tile: Tensor, corner: Tensor, value: Tensor, codes: Tensor, moved: Tensor
    ) -> None:
        """Columns `start` and following in the order of the sweep, n of them; rows are independent.

        tile (n, rows) float32, their part of R, is scratch afterwards; corner (n, n) float32 is H's, contiguous;
        value (n, rows) float32 and codes (n, rows) int8 are brought up to date; moved (n, rows) float32 is written:
        how far each value went. All contiguous.
        """


def descended(
    target: Tensor,
    codes: Tensor,
    grid: Grid,
    swept: Swept,
    residual: Tensor | None = None,
    block: int = BLOCK,
    kernel: Kernel | None = None,
) -> Tensor:
    """Codes after one sweep of coordinate descent, on the transpose so that a column is contiguous.

    `residual`: R = (V - W*) H (rows, columns), where it is known. `kernel` None takes what `columns.column_kernel`
    names for the device.
    """
    kernel = kernel or column_kernel(target.device)
    order = swept.order
    sweeper = _sweeper(kernel)(ColumnGrid.of(grid, order))
    value = dequantize(codes, grid).float().T[order].contiguous()
    if residual is None:
        residual = fine_product(dequantize(codes, grid).float() - target, swept.hessian)
    left = residual.T[order].contiguous()
    result = codes.T[order].contiguous()
    for here, corner, moved in blocks_of(left, swept.ordered, block, kernel, 1):
        sweeper.sweep_block(here.start, left[here], corner, value[here], result[here], moved)
    back = torch.empty_like(result)
    back[order] = result
    return back.T.contiguous()


def _sweeper(kernel: Kernel) -> type[BlockSweeper]:
    if kernel == "torch":
        return TorchSweeper
    if kernel == "numba":
        from compress.quantization.numba_columns import NumbaSweeper

        return NumbaSweeper
    from compress.quantization.triton_columns import TritonSweeper

    return TritonSweeper


class TorchSweeper:
    """The sweep in torch operations."""

    def __init__(self, grid: ColumnGrid) -> None:
        self.grid = grid
        self.group = grid.group.tolist()

    def sweep_block(
        self, start: int, tile: Tensor, corner: Tensor, value: Tensor, codes: Tensor, moved: Tensor
    ) -> None:
        grid, diagonal = self.grid, corner.diagonal().tolist()
        for j, pivot in enumerate(diagonal):
            group = self.group[start + j]
            scale = grid.scale[group]
            code = (value[j] - tile[j] / pivot) / scale
            if grid.zero is not None:
                code += grid.zero[group]
            code.round_().clamp_(grid.lowest, grid.highest)
            codes[j] = code.to(torch.int8)
            if grid.zero is not None:
                code -= grid.zero[group]
            new = (code * scale).to(grid.stored).float()
            moved[j] = new - value[j]
            value[j] = new
            if j + 1 < len(diagonal):
                tile[j + 1 :].addr_(corner[j, j + 1 :], moved[j])
