"""Scales and zero points of a weight matrix, rounding to such a grid, and back. `grid_search` finds the scales.

All scales are cast to the dtype they will be stored in *before* anything is rounded with them, so the codes fit the
scale a runtime will read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.quantization.scheme import GridName, Scheme
from compress.quantization.super_blocks import SuperBlocks

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
    """scale (rows, groups) in the stored dtype, or float32 for floating grids and super-blocks; zero (rows, groups)
    int8, float32 of super-blocks, or None for symmetric schemes."""

    scheme: Scheme
    scale: Tensor
    zero: Tensor | None
    nested: Nested | SuperBlocks | None = None
    """Where the scales are rounded too: what `scale`, and `zero` of super-blocks, were made from."""

    @classmethod
    def of_super_blocks(cls, scheme: Scheme, made_of: SuperBlocks) -> Grid:
        """The grid of a K-quant, or of free minima."""
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
            scale = torch.where(same, storable(scales, kept.scale.dtype, subnormal=True), kept.scale)
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
    grouped = by_group(weight, grid.scale.shape[1])
    codes = grouped / grid.scale.float().unsqueeze(-1)
    if grid.zero is not None:
        codes = codes + grid.zero.float().unsqueeze(-1)
    return codes.round_().clamp_(scheme.lowest, scheme.highest).to(torch.int8).flatten(1)


def dequantize(codes: Tensor, grid: Grid) -> Tensor:
    """Values (rows, columns) in the stored dtype: the product is rounded to it, as loaders do."""
    if grid.scheme.grid != "int":
        table = FLOATING_GRIDS[grid.scheme.grid].to(codes.device)
        return (by_group(table[codes.long()], grid.scale.shape[1]) * grid.scale.unsqueeze(-1)).flatten(1)
    # Of super-blocks scale and zero are float32, as llama.cpp computes.
    grouped = by_group(codes, grid.scale.shape[1]).to(grid.scale.dtype)
    if grid.zero is not None:
        grouped = grouped - grid.zero.to(grid.scale.dtype).unsqueeze(-1)
    return (grouped * grid.scale.unsqueeze(-1)).flatten(1)


def by_group(matrix: Tensor, groups: int) -> Tensor:
    """(rows, columns) -> (rows, groups, width)."""
    return matrix.reshape(matrix.shape[0], groups, -1)


def storable(scale: Tensor, stored: torch.dtype, subnormal: bool = False) -> Tensor:
    """A scale of any shape, cast to the stored dtype, away from zero and inside its range. Those of super-blocks may be
    subnormal: the integers that they multiply make up for the rounding."""
    limit = torch.finfo(stored).max
    floor = SMALLEST_SCALE if subnormal else max(SMALLEST_SCALE, torch.finfo(stored).smallest_normal)
    sign = torch.where(scale < 0, -1.0, 1.0)
    return (scale.abs().clamp(floor, limit) * sign).to(stored)
