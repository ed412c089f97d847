"""How one linear is stored: what grid its weights lie on, how many columns share a scale, what becomes of its inputs.

    codes   int8, (rows, columns), in [lowest, highest] = [-2^(b-1), 2^(b-1) - 1]
    scale   (rows, groups), stored dtype; may be negative (the grid is one longer below zero, so a negative scale
            turns the long side towards the larger tail)
    zero    int8, (rows, groups), asymmetric schemes only; float32 with `free_minima` and in K-quants
    value   = (code - zero) * scale, rounded to the stored dtype: what every loader computes

Example, 4 bits symmetric: weights [0.7, -0.8, 0.05, 0.31] with scale 0.1 have codes [7, -8, 0 or 1, 3].

The floating 4-bit grids of bitsandbytes, nf4 and fp4, have codes 0 to 15 that index a table, and scale float32: value =
table[code] * scale. K-quants (`nested` integers) have scales that are integers times a float16 of 256 columns
(`quantization.super_blocks`). `inputs: 8` says that inputs are quantised too while the linear runs, one scale a token
(`quantization.inputs`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Literal

from compress.quantization.super_blocks import K_QUANTS, SUPER, KQuant

BITS = (2, 3, 4, 5, 6, 8)
GridName = Literal["int", "nf4", "fp4"]


@dataclass(frozen=True)
class Scheme:
    """`group_size` is in input columns; None means one scale for a whole output row ("channel")."""

    bits: int
    symmetric: bool = True
    group_size: int | None = 64
    inputs: int | None = None
    """Bits that inputs are rounded to, symmetrically, a scale for each token; None where they are left alone."""
    outliers: float | None = None
    """With `inputs`: columns in which an input reaches this size stay in 16 bits, as in LLM.int8."""
    grid: GridName = "int"
    nested: bool = False
    """Scales are themselves rounded: of floating grids to 8 bits (double quantisation), of integers as in K-quants."""
    free_minima: bool = False
    """Asymmetric: the value of the lowest code is any float16 up to zero, not a multiple of the scale."""

    @classmethod
    def of_k_quant(cls, bits: int) -> Scheme:
        """The scheme of Q2_K to Q6_K."""
        layout = K_QUANTS[bits]
        return cls(bits, layout.symmetric, layout.width, nested=True)

    @property
    def k_quant(self) -> KQuant | None:
        """How scales are made up, for a K-quant."""
        return K_QUANTS[self.bits] if self.nested and self.grid == "int" else None

    @property
    def lowest(self) -> int:
        return -(1 << (self.bits - 1)) if self.grid == "int" else 0

    @property
    def highest(self) -> int:
        return (1 << (self.bits - 1)) - 1 if self.grid == "int" else (1 << self.bits) - 1

    def groups(self, columns: int) -> int:
        """Number of scales in a row of `columns` weights. `divides(columns)` must hold."""
        return 1 if self.group_size is None else columns // self.group_size

    @property
    def of_super_blocks(self) -> bool:
        """Whether a grid is made of `super_blocks.SuperBlocks`."""
        return self.k_quant is not None or self.free_minima

    def free_scales(self, columns: int) -> int:
        """Number of scales in a row that can take any value: of K-quants, one a super-block."""
        return columns // SUPER if self.k_quant else self.groups(columns)

    def width(self, columns: int) -> int:
        """Columns that share a scale."""
        return columns if self.group_size is None else self.group_size

    def divides(self, columns: int) -> bool:
        if self.k_quant:
            return columns % SUPER == 0
        return self.group_size is None or columns % self.group_size == 0

    def stored_bytes(self, rows: int, columns: int, scale_bytes: int = 2) -> int:
        """Bytes of one linear as it is usually packed: codes in 32-bit words, scales, zero points, shape. Each format
        has its own exact count; this is what stages compare schemes by."""
        if self.k_quant:
            return rows * columns // SUPER * self.k_quant.bytes
        packed = rows * math.ceil(columns * self.bits / 32) * 4
        groups = self.groups(columns)
        if self.free_minima:
            return packed + 2 * rows * groups * scale_bytes + 16
        zeros = 0 if self.symmetric else math.ceil(rows * self.bits / 32) * 4 * groups
        return packed + rows * groups * scale_bytes + zeros + 16

    @property
    def label(self) -> str:
        """In words, as reports print it: 'int4 symmetric group 64'."""
        span = "channel" if self.group_size is None else f"group {self.group_size}"
        if self.grid != "int":
            return f"{self.grid} {span}" + (", double quantised" if self.nested else "")
        if self.k_quant:
            return f"{self.k_quant.name} ({'symmetric' if self.symmetric else 'asymmetric'} group {self.group_size})"
        inputs = f", int{self.inputs} inputs" if self.inputs else ""
        below = f" below {self.outliers:g}" if self.outliers else ""
        free = ", free minima" if self.free_minima else ""
        return f"int{self.bits} {'symmetric' if self.symmetric else 'asymmetric'} {span}{free}{inputs}{below}"

    def to_json(self) -> dict[str, Any]:
        """Plain values; of what most schemes do not have, only what this one has."""
        always = ("bits", "symmetric", "group_size")
        return {
            each.name: getattr(self, each.name)
            for each in fields(self)
            if each.name in always or getattr(self, each.name) != each.default
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Scheme:
        return cls(**data)


Option = Scheme | None
"""What a matrix may get; None: it stays in 16 bits."""


def label_of(option: Option) -> str:
    """In words: 'int4 symmetric group 64', or '16 bits'."""
    return "16 bits" if option is None else option.label


def usable_group_sizes(columns: int, nearby: int, multiples_of: int = 1) -> list[int]:
    """Up to three divisors of `columns` closest to `nearby`: what an error message can offer instead."""
    divisors = [size for size in range(4, columns + 1) if columns % size == 0 and size % multiples_of == 0]
    return sorted(sorted(divisors, key=lambda size: abs(math.log(size / nearby)))[:3])
