"""Scales and zero points for a weight matrix, rounding to a grid, and back.

Notation: W (rows, columns) float32; h (columns,) or (rows, columns) non-negative importance of each column's squared
error; g = group width. All scales are cast to the dtype they will be stored in *before* anything is rounded with
them, so the codes fit the scale a runtime will read.

`search_grid` minimises sum_j h_j (w_j - value_j)^2 per row and group over shrunken ranges and, for symmetric grids,
both signs of the scale, then polishes with the closed form s = sum h w z / sum h z^2 at fixed codes z. For asymmetric
grids it goes on from up to twenty ranges, each fitted by least squares: scale s and minimum M of s q - M at the codes
q of the range; where zero points are integers, M goes to the nearest that one of them gives. Plain min-max spends the
grid on one outlier; see docs/adr/0004-scale-search.md for what the search buys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.quantization.gpu import gpu_kernels
from compress.quantization.scheme import GridName, Scheme
from compress.quantization.super_blocks import SuperBlocks

GPU_WEIGHTS = 1 << 26
"""Weights of the rows that a GPU searches together: 256 MiB in float32, few launches for large matrices."""
SMALLEST_SCALE = 2.0**-24
"""Below the smallest normal scale a group is all zeros for every purpose; keeps scales finite and invertible."""


FLOATING_GRIDS: dict[GridName, Tensor] = {
    "nf4": torch.tensor(
        [
            *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
            *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
            *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
            *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
        ]
    ),
    "fp4": torch.tensor(
        [
            *(0.0, 0.0625 / 12, 8 / 12, 1.0, 4 / 12, 6 / 12, 2 / 12, 3 / 12),
            *(0.0, -0.0625 / 12, -8 / 12, -1.0, -4 / 12, -6 / 12, -2 / 12, -3 / 12),
        ]
    ),
}
"""Value of each code, for a scale of 1. nf4: Dettmers et al., "QLoRA" (arXiv 2305.14314), appendix E; fp4: sign, two
bits of exponent, one of mantissa, over their largest value, as bitsandbytes tabulates them."""


@dataclass(frozen=True)
class Nested:
    """Scales in 8 bits: scale_i = table[codes_i] * absmax[i // run] + offset. codes uint8 (n,); absmax (n / run,),
    table (256,) and offset (1,) float32."""

    codes: Tensor
    absmax: Tensor
    table: Tensor
    offset: Tensor
    run: int = 256

    def scales(self) -> Tensor:
        """float32 (n,)."""
        return self.table[self.codes.long()] * self.absmax.repeat_interleave(self.run)[: len(self.codes)] + self.offset


@dataclass(frozen=True)
class Grid:
    """scale (rows, groups) in the stored dtype, or float32 for floating grids and K-quants; zero (rows, groups) int8,
    float32 for K-quants, or None for symmetric schemes."""

    scheme: Scheme
    scale: Tensor
    zero: Tensor | None
    nested: Nested | SuperBlocks | None = None
    """Where the scales are rounded too: what `scale`, and `zero` of K-quants, were made from."""

    @classmethod
    def of_super_blocks(cls, scheme: Scheme, made_of: SuperBlocks) -> Grid:
        """The grid of a K-quant."""
        scale, minima = made_of.group_scales(), made_of.group_minima()
        return cls(scheme, scale, None if minima is None else minima / scale + scheme.lowest, made_of)

    def rows(self, start: int, stop: int) -> Grid:
        """The part of the grid for some rows; not for nested scales of floating grids, whose runs cross rows."""
        return self.at(slice(start, stop))

    def at(self, which: slice | Tensor) -> Grid:
        """The grid of some rows, or of all in another order. As `rows`."""
        nested = self.nested.rows(which) if isinstance(self.nested, SuperBlocks) else None
        return Grid(self.scheme, self.scale[which], None if self.zero is None else self.zero[which], nested)

    @classmethod
    def cat(cls, parts: list[Grid]) -> Grid:
        """The grid of rows one below the other; not for nested scales of floating grids."""
        made_of = [part.nested for part in parts if isinstance(part.nested, SuperBlocks)]
        if made_of:
            return cls.of_super_blocks(parts[0].scheme, SuperBlocks.cat(made_of))
        zeros = [part.zero for part in parts if part.zero is not None]
        return cls(parts[0].scheme, torch.cat([part.scale for part in parts]), torch.cat(zeros) if zeros else None)

    def cpu(self) -> Grid:
        """In host memory; not for nested scales of floating grids."""
        made_of = self.nested
        if isinstance(made_of, SuperBlocks):
            return Grid.of_super_blocks(self.scheme, made_of.cpu())
        return Grid(self.scheme, self.scale.cpu(), None if self.zero is None else self.zero.cpu())

    @property
    def zero_points(self) -> Tensor:
        """float32 (rows, groups), of an asymmetric grid."""
        assert self.zero is not None
        return self.zero.float()

    @property
    def free_scales(self) -> Tensor:
        """The scales that can take any value of their dtype: (rows, groups), or (rows, super-blocks)."""
        return self.nested.scale if isinstance(self.nested, SuperBlocks) else self.scale

    def with_free_scales(self, scales: Tensor) -> Grid:
        """The grid with other scales, in place of `free_scales` and shaped like them; minima stay."""
        if isinstance(self.nested, SuperBlocks):
            kept = self.nested
            # A minimum is taken off, so a scale of the other sign would turn the grid away from its weights.
            same = (scales.sign() == kept.scale.float().sign()) | (kept.minimum is None)
            scale = torch.where(same, storable(scales, torch.float16, subnormal=True), kept.scale)
            return Grid.of_super_blocks(self.scheme, SuperBlocks(scale, kept.scales, kept.minimum, kept.minima))
        return Grid(self.scheme, storable(scales, self.scale.dtype), self.zero, self.nested)

    def multiples(self, codes: Tensor) -> Tensor:
        """What the free scales multiply: int16 (rows, free scales, columns each) of codes int8 (rows, columns)."""
        integers = codes.to(torch.int16).reshape(*self.scale.shape, -1)
        if isinstance(self.nested, SuperBlocks):
            if self.zero is not None:
                integers = integers - self.scheme.lowest
            if self.nested.scales is not None:
                integers = integers * self.nested.scales.to(torch.int16).unsqueeze(-1)
        elif self.zero is not None:
            integers = integers - self.zero.to(torch.int16).unsqueeze(-1)
        return integers.reshape(*self.free_scales.shape, -1)


def quantize(weight: Tensor, grid: Grid) -> Tensor:
    """Nearest codes, int8 (rows, columns), of `weight` (rows, columns) float32."""
    scheme = grid.scheme
    grouped = _grouped(weight, grid.scale.shape[1])
    codes = grouped / grid.scale.float().unsqueeze(-1)
    if grid.zero is not None:
        codes = codes + grid.zero.float().unsqueeze(-1)
    return codes.round_().clamp_(scheme.lowest, scheme.highest).to(torch.int8).flatten(1)


def dequantize(codes: Tensor, grid: Grid) -> Tensor:
    """Values (rows, columns) in the stored dtype: the product is rounded to it, as loaders do."""
    if grid.scheme.grid != "int":
        table = FLOATING_GRIDS[grid.scheme.grid].to(codes.device)
        return (_grouped(table[codes.long()], grid.scale.shape[1]) * grid.scale.unsqueeze(-1)).flatten(1)
    # Of super-blocks scale and zero are float32, as llama.cpp computes.
    grouped = _grouped(codes, grid.scale.shape[1]).to(grid.scale.dtype)
    if grid.zero is not None:
        grouped = grouped - grid.zero.to(grid.scale.dtype).unsqueeze(-1)
    return (grouped * grid.scale.unsqueeze(-1)).flatten(1)


def _grouped(matrix: Tensor, groups: int) -> Tensor:
    """(rows, columns) -> (rows, groups, width)."""
    return matrix.reshape(matrix.shape[0], groups, -1)


def minmax_grid(weight: Tensor, scheme: Scheme, stored: torch.dtype) -> Grid:
    """The grid that just covers each group. weight (rows, columns) float32."""
    grouped = _grouped(weight, scheme.groups(weight.shape[1]))
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
    grouped = _grouped(weight, groups)
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
    if scheme.free_minima:
        return _asymmetric((high - low) / (scheme.highest - scheme.lowest), -low, scheme, stored)
    scale = storable((high - low) / (scheme.highest - scheme.lowest), stored)
    zero = (scheme.lowest - low / scale.float()).round_().clamp_(scheme.lowest, scheme.highest)
    return Grid(scheme, scale, zero.to(torch.int8))


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


def storable(scale: Tensor, stored: torch.dtype, subnormal: bool = False) -> Tensor:
    """A scale of any shape, cast to the stored dtype, away from zero and inside its range. Those of super-blocks may be
    subnormal: the integers that they multiply make up for the rounding."""
    limit = torch.finfo(stored).max
    floor = SMALLEST_SCALE if subnormal else max(SMALLEST_SCALE, torch.finfo(stored).smallest_normal)
    sign = torch.where(scale < 0, -1.0, 1.0)
    return (scale.abs().clamp(floor, limit) * sign).to(stored)
