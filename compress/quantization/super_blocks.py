"""Scales that are small integers times a float16 of a super-block of 256 columns: the K-quants of llama.cpp.

A group's scale takes half a byte to a byte in place of two, so groups can be narrow:

    Q2_K   groups of 16   asymmetric   scale and minimum in 4 bits each            2.6250 bits a weight
    Q3_K   groups of 16   symmetric    scale in 6 bits, -32 to 31                  3.4375
    Q4_K   groups of 32   asymmetric   scale and minimum in 6 bits each            4.5000
    Q5_K   groups of 32   asymmetric   scale and minimum in 6 bits each            5.5000
    Q6_K   groups of 16   symmetric    scale in 8 bits, -128 to 127                6.5625

    value = d c q              symmetric: q the code, c the group's integer, d the super-block's float16
    value = d c q - e m        asymmetric: q = code - lowest, m the group's second integer, e another float16

As a grid of `quantization.grid`: scale = d c and zero = lowest + e m / (d c), both float32. Free minima (Q4_1, Q5_1)
are the same without integers: a d and an e for each group.
Source: block_q2_K to block_q6_K in ggml-common.h of llama.cpp.

Example, Q4_K: d = 0.01, c = 20, e = 0.02, m = 30: code -3 is q = 5, and its value 0.01 x 20 x 5 - 0.02 x 30 = 0.4.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

SUPER = 256
"""Columns of a super-block."""


@dataclass(frozen=True)
class KQuant:
    """One of the types. `bytes`: of a super-block; `lowest` to `highest`: of a group's integer c, which is never 0
    here (a scale must have an inverse); `most`: of its second, m."""

    name: str
    symmetric: bool
    width: int
    bytes: int
    lowest: int
    highest: int
    most: int = 0


K_QUANTS = {
    2: KQuant("Q2_K", False, 16, 84, 1, 15, 15),
    3: KQuant("Q3_K", True, 16, 110, -32, 31),
    4: KQuant("Q4_K", False, 32, 144, 1, 63, 63),
    5: KQuant("Q5_K", False, 32, 176, 1, 63, 63),
    6: KQuant("Q6_K", True, 16, 210, -128, 127),
}
"""By bits."""


@dataclass(frozen=True)
class SuperBlocks:
    """What scales, and minima where asymmetric, are made of. `scale` d and `minimum` e (rows, super-blocks) float16;
    `scales` c and `minima` m (rows, groups) int8, None where every group has a d and an e of its own."""

    scale: Tensor
    scales: Tensor | None
    minimum: Tensor | None = None
    minima: Tensor | None = None

    @property
    def integers(self) -> Tensor:
        """c of a K-quant, int8 (rows, groups)."""
        assert self.scales is not None, "free minima have none"
        return self.scales

    def group_scales(self) -> Tensor:
        """d c, float32 (rows, groups): exact, of 11 and 8 bits."""
        return self._times(self.scale, self.scales)

    def group_minima(self) -> Tensor | None:
        """e m, float32 (rows, groups)."""
        return None if self.minimum is None else self._times(self.minimum, self.minima)

    @staticmethod
    def _times(of_supers: Tensor, integers: Tensor | None) -> Tensor:
        if integers is None:
            return of_supers.float()
        return of_supers.float().repeat_interleave(integers.shape[1] // of_supers.shape[1], dim=1) * integers.float()

    def rows(self, which: slice | Tensor) -> SuperBlocks:
        """Those of some rows, or of all in another order."""
        return self._each(lambda part: part[which])

    def cpu(self) -> SuperBlocks:
        """In host memory."""
        return self._each(Tensor.cpu)

    def _each(self, change: Callable[[Tensor], Tensor]) -> SuperBlocks:
        parts = (self.scale, self.scales, self.minimum, self.minima)
        scale, scales, minimum, minima = (None if part is None else change(part) for part in parts)
        assert scale is not None
        return SuperBlocks(scale, scales, minimum, minima)

    @classmethod
    def cat(cls, parts: list[SuperBlocks]) -> SuperBlocks:
        """Of rows one below the other."""
        scale, *others = (
            [each for part in parts if (each := getattr(part, name)) is not None]
            for name in ("scale", "scales", "minimum", "minima")
        )
        return cls(torch.cat(scale), *(torch.cat(each) if each else None for each in others))
