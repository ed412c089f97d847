"""The scales and zero points that round a weight matrix with the least error.

Notation: W (rows, columns) float32; h (columns,) non-negative importance of each column's squared error; g = group
width.

`search_grid` minimises sum_j h_j (w_j - value_j)^2 per row and group over shrunken ranges and, for symmetric grids,
both signs of the scale, then polishes with the closed form s = sum h w z / sum h z^2 at fixed codes z. For asymmetric
grids it goes on from up to twenty ranges, each fitted by least squares: scale s and minimum M of s q - M at the codes
q of the range; where zero points are integers, M goes to the nearest that one of them gives. Plain min-max spends the
grid on one outlier; see docs/adr/0004-scale-search.md for what the search buys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.quantization.gpu import gpu_kernels
from compress.quantization.grid import SMALLEST_SCALE, Grid, by_group, storable
from compress.quantization.scheme import Scheme
from compress.quantization.super_blocks import SuperBlocks

GPU_WEIGHTS = 1 << 26
"""Weights of the rows that a GPU searches together: 256 MiB in float32, few launches for large matrices."""


def minmax_grid(weight: Tensor, scheme: Scheme, stored: torch.dtype) -> Grid:
    """The grid that just covers each group. weight (rows, columns) float32."""
    grouped = by_group(weight, scheme.groups(weight.shape[1]))
    one = torch.ones(grouped.shape[:2], device=weight.device)
    return _shrunken(*_ends(grouped, scheme), scheme, stored, one, one)


def search_grid(
    weight: Tensor, importance: Tensor | None, scheme: Scheme, stored: torch.dtype, rows_at_once: int = 64
) -> Grid:
    """The grid with the least weighted squared rounding error.

    weight (rows, columns) float32; importance (columns,) float32, None for the plain mean squared error.
    Rows are independent and are taken `rows_at_once` so that the candidates stay in cache.
    """
    if importance is None:
        importance = torch.ones(weight.shape[1], device=weight.device)
    # Dead columns still deserve a sane grid: give them a whisper of weight.
    importance = importance / importance.mean().clamp_min(1e-30) + 1e-6
    if weight.device.type != "cpu":
        rows_at_once = max(rows_at_once, GPU_WEIGHTS // max(1, weight.shape[1]))
    parts = [
        _search_rows(weight[start : start + rows_at_once], importance, scheme, stored)
        for start in range(0, weight.shape[0], rows_at_once)
    ]
    return Grid.cat(parts)


def _search_rows(weight: Tensor, importance: Tensor, scheme: Scheme, stored: torch.dtype) -> Grid:
    groups = scheme.groups(weight.shape[1])
    grouped = by_group(weight, groups)
    weights = importance.view(groups, -1)
    if scheme.free_minima:
        return _fitted(grouped, weights, minmax_grid(weight, scheme, stored), stored)
    low, high = _ends(grouped, scheme)
    shrink = torch.ones_like(high)
    sign = torch.ones_like(high)
    best = _shrunken(low, high, scheme, stored, shrink, sign)
    best_error = group_errors(grouped, weights, best)
    signs = (1.0, -1.0) if scheme.symmetric else (1.0,)
    # Coarse: the same shrink for all groups. Fine: around each group's own best.
    for factor in _COARSE[scheme.bits <= 3]:
        for direction in signs:
            step = torch.full_like(shrink, factor)
            facing = torch.full_like(sign, direction)
            candidate = _shrunken(low, high, scheme, stored, step, facing)
            best, best_error, shrink, sign = _try(
                grouped, weights, candidate, step, facing, best, best_error, shrink, sign
            )
    centre, facing = shrink, sign
    for offset in _FINE:
        candidate = _shrunken(low, high, scheme, stored, centre + offset, facing)
        best, best_error, shrink, sign = _try(
            grouped, weights, candidate, centre + offset, facing, best, best_error, shrink, sign
        )
    for _ in range(2):
        polished = _polish(grouped, weights, best, stored)
        error = group_errors(grouped, weights, polished)
        best = _choose(error < best_error, polished, best)
        best_error = torch.minimum(error, best_error)
    return best if scheme.symmetric else _fitted(grouped, weights, best, stored)


def _fitted(grouped: Tensor, weights: Tensor, best: Grid, stored: torch.dtype) -> Grid:
    """An asymmetric grid with the least error of `best` and of fits from ranges at the lower end and at the upper."""
    scheme = best.scheme
    error = group_errors(grouped, weights, best)
    low, high = _ends(grouped, scheme)
    span = ((high - low) / (scheme.highest - scheme.lowest)).clamp_min(SMALLEST_SCALE)
    starts: list[tuple[Tensor, Tensor] | None] = []
    for step in _SPANS[scheme.bits <= 3]:
        starts += [(span * step, -low), (span * step, (-low - (1 - step) * (high - low)).clamp_min(0))]
    for start in (*starts, None, None):
        scale, minimum = start or (best.scale.float(), (best.zero_points - scheme.lowest) * best.scale.float())
        zero = minimum / scale
        integers = nearest_integers(grouped, Grid(scheme, scale, zero + scheme.lowest)) + zero.unsqueeze(-1)
        candidate = _asymmetric(*line(integers.round_(), grouped, weights), scheme, stored)
        candidates = [candidate] if scheme.free_minima else [candidate, _polish(grouped, weights, candidate, stored)]
        for each in candidates:
            found = group_errors(grouped, weights, each)
            best, error = _choose(found < error, each, best), torch.minimum(found, error)
    return best


def _asymmetric(scale: Tensor, minimum: Tensor, scheme: Scheme, stored: torch.dtype) -> Grid:
    """The grid with these scales and minima (rows, groups) float32, as near as it can be stored."""
    if scheme.free_minima:
        kept = torch.float32 if stored == torch.float32 else torch.float16
        scale, minimum = (storable(each, kept, subnormal=True) for each in (scale, minimum))
        return Grid.of_super_blocks(scheme, SuperBlocks(scale, None, minimum))
    scale = storable(scale, stored)
    zero = (scheme.lowest + minimum / scale.float()).round_().clamp_(scheme.lowest, scheme.highest)
    return Grid(scheme, scale, zero.to(torch.int8))


def line(integers: Tensor, target: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """s and M >= 0 with the least sum of weights (target - s q + M)^2, over the last dimension; s is positive where
    that can be. integers q and target (..., width) float32."""
    total = weights.sum(-1)
    first, square = (weights * integers).sum(-1), (weights * integers * integers).sum(-1)
    with_target, sum_of_target = (weights * integers * target).sum(-1), (weights * target).sum(-1)
    determinant = total * square - first * first
    scale = (total * with_target - first * sum_of_target) / determinant.clamp_min(1e-30)
    minimum = (first * scale - sum_of_target) / total
    through_zero = with_target / square.clamp_min(1e-30)
    scale = torch.where(minimum < 0, through_zero, scale).clamp_min(SMALLEST_SCALE)
    return scale, minimum.clamp_min(0)


_COARSE = {
    False: (1.0, 0.93, 0.86, 0.79, 0.72, 0.64, 0.55),
    True: (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3),
}
_SPANS = {
    False: (1.06, 1.03, 1.0, 0.97, 0.94, 0.91, 0.88, 0.85, 0.82, 0.78),
    True: (1.06, 1.0, 0.94, 0.88, 0.82, 0.74, 0.66),
}
"""Of what lies between a group's ends."""
_FINE = (-0.045, -0.03, -0.015, 0.015, 0.03, 0.045)


def _try(
    grouped: Tensor,
    weights: Tensor,
    candidate: Grid,
    step: Tensor,
    facing: Tensor,
    best: Grid,
    best_error: Tensor,
    shrink: Tensor,
    sign: Tensor,
) -> tuple[Grid, Tensor, Tensor, Tensor]:
    """One candidate per group: keep it where it is better. Tensors are (rows, groups)."""
    error = group_errors(grouped, weights, candidate)
    better = error < best_error
    return (
        _choose(better, candidate, best),
        torch.minimum(error, best_error),
        torch.where(better, step, shrink),
        torch.where(better, facing, sign),
    )


def _ends(grouped: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Lowest and highest (rows, groups) that a grid must reach: of absolute values for symmetric schemes."""
    low, high = grouped.amin(-1), grouped.amax(-1)
    if scheme.symmetric:
        high = torch.maximum(low.abs(), high.abs())
        return -high, high
    return low.clamp_(max=0), high.clamp_(min=0)


def _shrunken(low: Tensor, high: Tensor, scheme: Scheme, stored: torch.dtype, step: Tensor, facing: Tensor) -> Grid:
    """The grid that covers `step` times what lies between two ends, with scales of the sign `facing`."""
    if scheme.symmetric:
        scale = high * step / (scheme.highest + 0.5) * facing
        return Grid(scheme, storable(scale, stored), None)
    low, high = low * step, high * step
    return _asymmetric((high - low) / (scheme.highest - scheme.lowest), -low, scheme, stored)


def nearest_integers(grouped: Tensor, grid: Grid) -> Tensor:
    """Codes minus zero points, float32 (rows, groups, width): the integers that the scale multiplies."""
    scheme = grid.scheme
    codes = grouped / grid.scale.float().unsqueeze(-1)
    if grid.zero is None:
        return codes.round_().clamp_(scheme.lowest, scheme.highest)
    zero = grid.zero.float().unsqueeze(-1)
    return codes.add_(zero).round_().clamp_(scheme.lowest, scheme.highest).sub_(zero)


def group_errors(grouped: Tensor, weights: Tensor, grid: Grid) -> Tensor:
    """Sum of weights (groups, width) times the squared rounding error of each group, float32 (rows, groups)."""
    if gpu_kernels(grouped.device):
        from compress.quantization.triton_grid import weighted_error

        return weighted_error(grouped, weights, grid)
    residual = nearest_integers(grouped, grid).mul_(grid.scale.float().unsqueeze(-1)).sub_(grouped)
    return residual.square_().mul_(weights).sum(-1)


def _polish(grouped: Tensor, weights: Tensor, grid: Grid, stored: torch.dtype) -> Grid:
    """Least-squares scale at fixed codes."""
    codes = nearest_integers(grouped, grid)
    weighted = codes * weights
    scale = (weighted * grouped).sum(-1) / (weighted * codes).sum(-1).clamp_min(1e-30)
    # All codes zero: nothing to fit, keep the scale.
    scale = torch.where(scale.abs() > SMALLEST_SCALE, scale, grid.scale.float())
    return Grid(grid.scheme, storable(scale, stored), grid.zero)


def _choose(better: Tensor, new: Grid, old: Grid) -> Grid:
    if isinstance(new.nested, SuperBlocks) and isinstance(old.nested, SuperBlocks):
        assert new.nested.minimum is not None and old.nested.minimum is not None, "free minima, not K-quants"
        scale = torch.where(better, new.nested.scale, old.nested.scale)
        minimum = torch.where(better, new.nested.minimum, old.nested.minimum)
        return Grid.of_super_blocks(old.scheme, SuperBlocks(scale, None, minimum))
    zero = None if old.zero is None or new.zero is None else torch.where(better, new.zero, old.zero)
    return Grid(old.scheme, torch.where(better, new.scale, old.scale), zero)
