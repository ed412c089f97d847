"""A weight-only scheme: how many bits, what grid, how many columns share a scale.

    codes   int8, (rows, columns), in [lowest, highest] = [-2^(b-1), 2^(b-1) - 1]
    scale   (rows, groups), stored dtype; may be negative (the grid is one longer below zero, so a negative scale
            turns the long side towards the larger tail)
    zero    int8, (rows, groups), asymmetric schemes only
    value   = (code - zero) * scale, rounded to the stored dtype: what every loader computes

Example, 4 bits symmetric: weights [0.7, -0.8, 0.05, 0.31] with scale 0.1 have codes [7, -8, 0 or 1, 3].
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

BITS = (2, 3, 4, 5, 6, 8)


@dataclass(frozen=True)
class Scheme:
    """`group_size` is in input columns; None means one scale for a whole output row ("channel")."""

    bits: int
    symmetric: bool = True
    group_size: int | None = 64

    @property
    def lowest(self) -> int:
        return -(1 << (self.bits - 1))

    @property
    def highest(self) -> int:
        return (1 << (self.bits - 1)) - 1

    def groups(self, columns: int) -> int:
        """Number of scales in a row of `columns` weights. `divides(columns)` must hold."""
        return 1 if self.group_size is None else columns // self.group_size

    def width(self, columns: int) -> int:
        """Columns that share a scale."""
        return columns if self.group_size is None else self.group_size

    def divides(self, columns: int) -> bool:
        return self.group_size is None or columns % self.group_size == 0

    def stored_bytes(self, rows: int, columns: int, scale_bytes: int = 2) -> int:
        """Bytes of one linear in compressed-tensors pack-quantized: packed codes, scales, zero points, shape."""
        packed = rows * math.ceil(columns * self.bits / 32) * 4
        groups = self.groups(columns)
        zeros = 0 if self.symmetric else math.ceil(rows * self.bits / 32) * 4 * groups
        return packed + rows * groups * scale_bytes + zeros + 16

    @property
    def label(self) -> str:
        """In words, as reports print it: 'int4 symmetric group 64'."""
        span = "channel" if self.group_size is None else f"group {self.group_size}"
        return f"int{self.bits} {'symmetric' if self.symmetric else 'asymmetric'} {span}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Scheme:
        return cls(int(data["bits"]), bool(data["symmetric"]), data["group_size"])


def usable_group_sizes(columns: int, nearby: int) -> list[int]:
    """Up to three divisors of `columns` closest to `nearby`: what an error message can offer instead."""
    divisors = [size for size in range(4, columns + 1) if columns % size == 0]
    return sorted(sorted(divisors, key=lambda size: abs(math.log(size / nearby)))[:3])
