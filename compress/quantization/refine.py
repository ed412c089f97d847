"""After GPTQ: fit all scales of a row together, go over the codes once more, fit again.

GPTQ settles a column for good before it knows what the later ones will do, and its scales were chosen before any code.
Both can be revisited with the same Hessian H, for row w* (the target), codes z (zero points taken off) and scales s:

scales   value = sum_g s_g z_g, with z_g the codes of group g and zeros elsewhere, is linear in s: least squares gives
         (A + mu diag A) s = b + mu diag(A) s_0,   A_gh = z_g H z_h,   b_g = z_g H w*        (G x G for each row)
codes    cyclic coordinate descent: with R = (value - w*) H, column j is best at value_j - R_j / H_jj; take the nearest
         code and bring R up to date, columns in descending diag H. Never increases (value - w*) H (value - w*).

Less error on the calibration tokens may be more on others: the caller accepts a refinement only where a Hessian that
it was not computed from agrees. Sources: CDQuant (arXiv 2406.17542), QuantEase (2309.01885); the joint fit of scales
replaces the coordinate descent of Two-Stage (2602.02126).

Example, one row, one group, H = I, w* = [1.0, 2.2], z = [1, 2]: s = (1 x 1 + 2 x 2.2) / (1 + 4) = 1.08.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.quantization.grid import Grid, dequantize, storable

MU = 0.05
"""Pull of the fitted scales towards the old ones, fraction of diag A."""
SYSTEM_NUMBERS = 1 << 22
"""Numbers in the G x G systems that are solved together: with many groups, few rows at a time."""
BLOCK = 64
"""Columns between two products that bring R up to date."""


@dataclass(frozen=True)
class Split:
    """Hessians over disjoint tokens, float32 (columns, columns)."""

    fitted: Tensor
    """Refinements are computed from this one."""
    held_out: Tensor
    """And judged by this one."""


def refined(target: Tensor, codes: Tensor, grid: Grid, hessian: Tensor, rounds: int = 1) -> tuple[Tensor, Grid]:
    """Codes int8 (rows, columns) and grid with no more error tr[(V - W*) H (V - W*)^T] than the given ones.

    target W* (rows, columns) float32; hessian (columns, columns) float32, positive definite (damped).
    """
    grid = fitted_scales(target, codes, grid, hessian)
    for _ in range(rounds):
        codes = descended(target, codes, grid, hessian)
        grid = fitted_scales(target, codes, grid, hessian)
    return codes, grid


def fitted_scales(target: Tensor, codes: Tensor, grid: Grid, hessian: Tensor) -> Grid:
    """The grid with each row's scales fitted together, cast to the stored dtype. A row that gains nothing keeps its."""
    rows, groups = grid.scale.shape
    step = max(1, SYSTEM_NUMBERS // groups**2)
    parts = [
        _fitted_rows(target[start : start + step], codes[start : start + step], grid.rows(start, start + step), hessian)
        for start in range(0, rows, step)
    ]
    return Grid(grid.scheme, torch.cat([part.scale for part in parts]), grid.zero)


def _fitted_rows(target: Tensor, codes: Tensor, grid: Grid, hessian: Tensor) -> Grid:
    rows, groups = grid.scale.shape
    integers = codes.float().view(rows, groups, -1)
    if grid.zero is not None:
        integers = integers - grid.zero.float().unsqueeze(-1)
    width = integers.shape[-1]
    moments = torch.empty(rows, groups, groups, device=target.device)
    for group in range(groups):
        columns = slice(group * width, (group + 1) * width)
        product = (integers[:, group] @ hessian[columns]).view(rows, groups, width)
        moments[:, group] = (product * integers).sum(-1)
    right = ((target @ hessian).view(rows, groups, width) * integers).sum(-1)
    diagonal = moments.diagonal(dim1=1, dim2=2)
    excited = diagonal > 0
    old = grid.scale.float()
    # A group whose codes are all zero has no say: keep its scale.
    pull = MU * diagonal + ~excited
    right += pull * old
    diagonal += pull
    fitted = _solved(moments, right)
    new = storable(torch.where(excited & torch.isfinite(fitted), fitted, old), grid.scale.dtype)
    candidate = Grid(grid.scheme, new, grid.zero)
    better = row_losses(target, codes, candidate, hessian) < row_losses(target, codes, grid, hessian)
    return Grid(grid.scheme, torch.where(better.unsqueeze(1), new, grid.scale), grid.zero)


def _solved(matrices: Tensor, right: Tensor) -> Tensor:
    """Solutions (rows, groups) of symmetric systems; NaN where one is not definite."""
    lower, failed = torch.linalg.cholesky_ex(matrices)
    solution = torch.cholesky_solve(right.unsqueeze(-1), lower).squeeze(-1)
    return torch.where(failed.unsqueeze(1) == 0, solution, torch.nan)


def descended(target: Tensor, codes: Tensor, grid: Grid, hessian: Tensor) -> Tensor:
    """Codes after one sweep of coordinate descent, on the transpose so that a column is contiguous."""
    scheme, stored = grid.scheme, grid.scale.dtype
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    width = scheme.width(target.shape[1])
    groups = (order // width).tolist()
    scales = grid.scale.T.float().contiguous()
    zeros = None if grid.zero is None else grid.zero.T.float().contiguous()
    ordered = hessian[order][:, order]
    value = dequantize(codes, grid).float().T[order].contiguous()
    residual = ordered @ (value - target.T[order])
    result = codes.T[order].contiguous()
    diagonal = ordered.diagonal().tolist()
    for start in range(0, len(order), BLOCK):
        stop = min(start + BLOCK, len(order))
        tile, corner = residual[start:stop], ordered[start:stop, start:stop]
        moved = torch.zeros_like(tile)
        for j in range(stop - start):
            column, scale = start + j, scales[groups[start + j]]
            wanted = value[column] - tile[j] / diagonal[column]
            code = wanted / scale
            if zeros is not None:
                code += zeros[groups[column]]
            code.round_().clamp_(scheme.lowest, scheme.highest)
            result[column] = code.to(torch.int8)
            if zeros is not None:
                code -= zeros[groups[column]]
            new = (code * scale).to(stored).float()
            moved[j] = new - value[column]
            value[column] = new
            tile.addr_(corner[j], moved[j])
        if stop < len(order):
            residual[stop:].addmm_(ordered[start:stop, stop:].T, moved)
    back = torch.empty_like(result)
    back[order] = result
    return back.T.contiguous()


def row_losses(target: Tensor, codes: Tensor, grid: Grid, hessian: Tensor) -> Tensor:
    """(v - w*) H (v - w*) of each row, float32 (rows,)."""
    difference = dequantize(codes, grid).float() - target
    return ((difference @ hessian) * difference).sum(-1)
