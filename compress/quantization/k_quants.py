"""Integers and float16s of a K-quant's scales for a weight matrix, with the least weighted squared rounding error.

Notation as in `grid` and `super_blocks`: d c is a group's scale, e m its minimum; h the importance of a column.

1. Each group for itself: the search of `grid_search`, with free scales s and for asymmetric types free minima M, in
   float32.
2. Each super-block: d and e such that the widest group takes the largest integer, or somewhat less, both signs of d
   where symmetric; c = s / d and m = M / e to the nearest. The best of a few is kept.
3. In turns: every c and m one up or down, kept where the group's error falls; d and e of a super-block together by
   least squares at fixed codes and integers, in float16, kept where the super-block's error falls.

llama.cpp's own quantisers do the like of 1 and 2, by an importance matrix where there is one. What they and step 3 give
is in docs/benchmarks/gguf.md.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from compress.quantization.grid import Grid, storable
from compress.quantization.grid_search import GPU_WEIGHTS, group_errors, minmax_grid, nearest_integers, search_grid
from compress.quantization.scheme import Scheme
from compress.quantization.super_blocks import SUPER, KQuant, SuperBlocks

SHRINKS = (1.0, 0.94, 0.88, 0.8)
"""Of the d with which the widest group takes the largest integer."""
ROUNDS = 2
"""Of step 3."""
ROWS = 64
"""Taken together on a CPU, so that they stay in the cache."""


def k_quant_grid(weight: Tensor, importance: Tensor | None, scheme: Scheme, search: bool = True) -> Grid:
    """The grid of a K-quant for weight (rows, columns) float32; importance (columns,) float32, None for the plain
    squared error. Without `search`: scales that just cover each group, nested by step 2's first choice."""
    layout = scheme.k_quant
    assert layout is not None
    if importance is None:
        importance = torch.ones(weight.shape[1], device=weight.device)
    importance = importance / importance.mean().clamp_min(1e-30) + 1e-6
    rows = ROWS if weight.device.type == "cpu" else max(ROWS, GPU_WEIGHTS // max(1, weight.shape[1]))
    parts = [
        _Rows(weight[start : start + rows], importance, scheme, layout).nested(search)
        for start in range(0, weight.shape[0], rows)
    ]
    return Grid.of_super_blocks(scheme, SuperBlocks.cat(parts))


class _Rows:
    """Some rows of a matrix, and the search over their integers."""

    def __init__(self, weight: Tensor, importance: Tensor, scheme: Scheme, layout: KQuant) -> None:
        self.scheme, self.layout = scheme, layout
        self.weight, self.importance = weight, importance
        self.grouped = weight.reshape(weight.shape[0], -1, layout.width)
        self.weights = importance.view(-1, layout.width)

    def nested(self, search: bool) -> SuperBlocks:
        scheme = dataclasses.replace(self.scheme, nested=False, free_minima=not self.scheme.symmetric)
        if search:
            free = search_grid(self.weight, self.importance, scheme, torch.float32, rows_at_once=len(self.weight))
        else:
            free = minmax_grid(self.weight, scheme, torch.float32)
        minimum = free.nested.group_minima() if isinstance(free.nested, SuperBlocks) else None
        best = self._widest(free.scale, minimum, SHRINKS if search else SHRINKS[:1])
        for _ in range(ROUNDS if search else 0):
            best = self._fit(self._step(best))
        return best

    def _grid(self, made_of: SuperBlocks) -> Grid:
        return Grid.of_super_blocks(self.scheme, made_of)

    def _errors(self, grid: Grid) -> Tensor:
        """(rows, groups)."""
        return group_errors(self.grouped, self.weights, grid)

    def _by_super(self, errors: Tensor) -> Tensor:
        """(rows, super-blocks) of (rows, groups)."""
        return errors.view(len(errors), -1, SUPER // self.layout.width).sum(-1)

    def _widest(self, scale: Tensor, minimum: Tensor | None, shrinks: tuple[float, ...]) -> SuperBlocks:
        """Step 2."""
        layout, rows = self.layout, len(scale)
        by_super = scale.view(rows, -1, SUPER // layout.width)
        widest = by_super.gather(-1, by_super.abs().argmax(-1, keepdim=True)).squeeze(-1)
        ends = (layout.highest, layout.lowest) if layout.symmetric else (layout.highest,)
        offsets = offset_integers = None
        if minimum is not None:
            of_minima = minimum.view(by_super.shape)
            offsets = _halved(of_minima.amax(-1) / layout.most)
            offset_integers = (of_minima / offsets.float().unsqueeze(-1)).round().clamp(0, layout.most)
            offset_integers = offset_integers.to(torch.int8).view(rows, -1)
        best, least = None, None
        for shrink in shrinks:
            for end in ends:
                divisor = _halved(widest / end * shrink)
                integers = self._integers(by_super / divisor.float().unsqueeze(-1)).view(rows, -1)
                found = SuperBlocks(divisor, integers, offsets, offset_integers)
                errors = self._by_super(self._errors(self._grid(found)))
                if best is None or least is None:
                    best, least = found, errors
                else:
                    best, least = self._better(errors < least, found, best), torch.minimum(errors, least)
        assert best is not None
        return best

    def _integers(self, ratios: Tensor) -> Tensor:
        """The nearest c, int8; never 0."""
        found = ratios.round().clamp(self.layout.lowest, self.layout.highest)
        return torch.where(found == 0, torch.where(ratios < 0, -1.0, 1.0), found).to(torch.int8)

    def _better(self, better: Tensor, new: SuperBlocks, old: SuperBlocks) -> SuperBlocks:
        """`new` in the super-blocks (rows, super-blocks) where it is better."""
        by_group = better.repeat_interleave(SUPER // self.layout.width, dim=1)

        def chosen(where: Tensor, first: Tensor | None, second: Tensor | None) -> Tensor | None:
            return None if first is None or second is None else torch.where(where, first, second)

        scale, scales = torch.where(better, new.scale, old.scale), chosen(by_group, new.scales, old.scales)
        minima = chosen(by_group, new.minima, old.minima)
        return SuperBlocks(scale, scales, chosen(better, new.minimum, old.minimum), minima)

    def _step(self, best: SuperBlocks) -> SuperBlocks:
        """Step 3, the integers."""
        layout = self.layout
        error = self._errors(self._grid(best))
        for name, lowest, highest in (("scales", layout.lowest, layout.highest), ("minima", 0, layout.most)):
            if getattr(best, name) is None:
                continue
            for step in (1, -1):
                old = getattr(best, name)
                moved = (old.to(torch.int16) + step).clamp(lowest, highest).to(torch.int8)
                if name == "scales":
                    moved = torch.where(moved == 0, old, moved)
                found = self._errors(self._grid(dataclasses.replace(best, **{name: moved})))
                better = found < error
                best = dataclasses.replace(best, **{name: torch.where(better, moved, old)})
                error = torch.minimum(error, found)
        return best

    def _fit(self, best: SuperBlocks) -> SuperBlocks:
        """Step 3, the float16s."""
        grid = self._grid(best)
        error = self._by_super(self._errors(grid))
        shape = (len(self.grouped), -1, SUPER)
        # Codes with what is taken off them: integers from lowest on for asymmetric types.
        integers = nearest_integers(self.grouped, grid)
        if grid.zero is not None:
            integers = integers + (grid.zero - self.scheme.lowest).unsqueeze(-1)
        products = (integers.round() * best.integers.unsqueeze(-1)).view(shape)
        target, weights = self.grouped.view(shape), self.weights.view(-1, SUPER)
        if best.minima is None or best.minimum is None:
            weighted = products * weights
            scale = (weighted * target).sum(-1) / (weighted * products).sum(-1).clamp_min(1e-30)
            usable = scale != 0
            found = dataclasses.replace(best, scale=torch.where(usable, _halved(scale), best.scale))
        else:
            minima = best.minima.float().repeat_interleave(self.layout.width, dim=1).view(shape)
            scale, minimum = _plane(products, minima, target, weights)
            usable = (scale > 0) & (minimum >= 0)
            found = dataclasses.replace(
                best,
                scale=torch.where(usable, _halved(scale), best.scale),
                minimum=torch.where(usable, _halved(minimum), best.minimum),
            )
        return self._better(self._by_super(self._errors(self._grid(found))) < error, found, best)


def _halved(values: Tensor) -> Tensor:
    return storable(values, torch.float16, subnormal=True)


def _plane(products: Tensor, minima: Tensor, target: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """d and e with the least sum of weights (target - d a + e m)^2, over the last dimension; e is 0 where no m is, and
    both are NaN where they are not unique."""
    aa, am = (weights * products * products).sum(-1), (weights * products * minima).sum(-1)
    mm, at = (weights * minima * minima).sum(-1), (weights * products * target).sum(-1)
    mt = (weights * minima * target).sum(-1)
    determinant = am * am - aa * mm
    no_minima = mm == 0
    scale = torch.where(no_minima, at / aa, (am * mt - at * mm) / determinant)
    minimum = torch.where(no_minima, 0.0, (aa * mt - am * at) / determinant)
    return scale, minimum
