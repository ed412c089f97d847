"""A trained tensor as a relative change of a stored one, seen through the rounding of what will be stored.

Notation: b the stored value, o an offset (Gemma's norms multiply by 1 + weight), f the trained factor, zero at first:

    value = cast((b + o) (1 + f) - o)          cast: to the stored 16-bit dtype and back

so one learning rate suits scales and norms of any size. The forward pass sees what a loader will read; the gradient
passes the cast unchanged (straight-through estimator, arXiv 1308.3432). Steps too small for 16 bits add up in f.

Example in float16, where numbers near 1 are 0.00098 apart: b = 1 and f = 0.0003 give 1, f = 0.0006 gives 1.00098.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from compress.quantization.grid import storable


class _ThroughStorage(torch.autograd.Function):
    """float32 -> what the stored dtype keeps of it, as float32; the gradient passes unchanged."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, stored: torch.dtype, nonzero: bool, subnormal: bool) -> Tensor:
        return (storable(value, stored, subnormal) if nonzero else value.to(stored)).float()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return gradients[0], None, None, None


def through_storage(value: Tensor, stored: torch.dtype, nonzero: bool = False, subnormal: bool = False) -> Tensor:
    """`value` float32 as the stored dtype keeps it, again float32; gradients pass unchanged."""
    kept: Tensor = _ThroughStorage.apply(value, stored, nonzero, subnormal)  # type: ignore[no-untyped-call]
    return kept


class Relative(nn.Module):
    """`base` of any shape, in the stored dtype; `factor` float32 of the same shape is what is trained.

    `nonzero` keeps values away from zero and infinity, as scales must be, `subnormal` no further than `storable` says.
    """

    def __init__(self, base: Tensor, offset: float = 0.0, nonzero: bool = False, subnormal: bool = False) -> None:
        super().__init__()
        self.base: Tensor
        self.register_buffer("base", base)
        self.factor = nn.Parameter(torch.zeros_like(base, dtype=torch.float32))
        self.offset, self.nonzero, self.subnormal = offset, nonzero, subnormal

    def forward(self) -> Tensor:
        """The value, float32, exactly representable in the stored dtype."""
        exact = (self.base.float() + self.offset) * (1 + self.factor) - self.offset
        return through_storage(exact, self.base.dtype, self.nonzero, self.subnormal)

    def factors(self) -> dict[str, nn.Parameter]:
        return {"": self.factor}

    @torch.no_grad()
    def stored(self) -> Tensor:
        """The value in the stored dtype. With a factor of zero it is `base`, bit for bit."""
        if not self.factor.any():
            return self.base
        value: Tensor = self().to(self.base.dtype)
        return value
