"""A linear whose weight is integer codes times trained scales; the codes may be trained too.

Notation: codes c (rows, columns) int8, zero points z and scales s (rows, groups), x (tokens, columns) the input:

    W = cast(s (c - z))     y = x W^T     dx = dy W
    ds[r, g] = sum over columns j of group g of (dy^T x)[r, j] (c - z)[r, j]

Neither W nor its gradient outlives the operation that needs it: W is rebuilt from the codes in the backward pass, and
dy^T x is summed over groups at once. Of K-quants the super-blocks' scales are trained, (c - z) then is q times the
group's integer, and minima stay. What is kept between the passes is the input, a byte a weight, and the scales. The
cast of the product is the loaders' (`grid.dequantize`); the gradient passes it unchanged.

Trained codes are round(c + f) within the scheme's range, f float32. The gradient passes the rounding unchanged
(straight-through, arXiv 1308.3432): df = dy^T x s. It passes inputs that are rounded (W8A8) in the same way. f starts
within half a code of zero, on the side where the weight w lies that was quantised (`towards`), so that the codes which
are furthest from theirs have the shortest way back: f = clip(0.5 (w / s + z - c), -0.3, 0.3).

Example: codes [7, -8], one group, s = 0.1, x = [1, 2], dy = 1: W = [0.7, -0.8], y = -0.9, ds = 1*7 + 2*(-8) = -9.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from compress.quantization.grid import Grid, dequantize
from compress.quantization.inputs import rounded_inputs
from compress.quantization.scheme import Scheme
from compress.quantization.super_blocks import SuperBlocks
from compress.training.relative import Relative

TOWARDS = 0.5
"""Share of the way from a code to the weight it was made of that its step starts at. At all of it, many codes change at
once and the divergence first rises two- to threefold."""
NEAREST_TO_EDGE = 0.3
"""A step past one half changes the code; a start leaves some steps in which noise can show that it is only that."""


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        scale: Tensor,
        codes: Tensor,
        grid_at: Callable[[Tensor], Grid],
        step: Tensor | None,
    ) -> Tensor:
        grid = grid_at(scale)
        codes = codes if step is None else _moved(codes, step, grid.scheme)
        ctx.save_for_backward(inputs, scale, codes)
        ctx.grid_at = grid_at
        return inputs @ dequantize(codes, grid).to(inputs.dtype).T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        inputs, scale, codes = ctx.saved_tensors
        grid = ctx.grid_at(scale)
        (gradient,) = gradients
        to_inputs = to_scale = to_step = None
        if ctx.needs_input_grad[0]:
            to_inputs = gradient @ dequantize(codes, grid).to(gradient.dtype)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[4]:
            to_weight = gradient.flatten(0, -2).T @ inputs.flatten(0, -2).to(gradient.dtype)
            to_scale = (to_weight.view(*scale.shape, -1).float() * grid.multiples(codes)).sum(-1)
            if ctx.needs_input_grad[4]:
                grouped = to_weight.view(*grid.scale.shape, -1).float()
                to_step = (grouped * grid.scale.float().unsqueeze(-1)).flatten(1)
        return to_inputs, to_scale, None, None, to_step


def _moved(codes: Tensor, step: Tensor, scheme: Scheme) -> Tensor:
    return (codes + step).round_().clamp_(scheme.lowest, scheme.highest).to(torch.int8)


class MovedCodes(nn.Module):
    """`codes` int8 (rows, columns) with a trained step away from them, float32 in units of a code: at first zero, or
    `start` (rows, columns), which is less than a half everywhere."""

    def __init__(self, codes: Tensor, scheme: Scheme, start: Tensor | None = None) -> None:
        super().__init__()
        self.codes: Tensor
        self.register_buffer("codes", codes)
        self.factor = nn.Parameter(torch.zeros(codes.shape) if start is None else start)
        self.scheme = scheme

    def factors(self) -> dict[str, nn.Parameter]:
        return {"": self.factor}

    @torch.no_grad()
    def stored(self) -> Tensor:
        """int8 (rows, columns)."""
        return _moved(self.codes, self.factor, self.scheme)


def towards(codes: Tensor, grid: Grid, weight: Tensor) -> Tensor:
    """Where steps away from `codes` start, float32 (rows, columns), for the `weight` that they were made of."""
    grouped = weight.float().reshape(*grid.scale.shape, -1) / grid.scale.float().unsqueeze(-1)
    if grid.zero is not None:
        grouped = grouped + grid.zero.float().unsqueeze(-1)
    step = grouped.flatten(1) - codes.float()
    return (TOWARDS * step).clamp_(-NEAREST_TO_EDGE, NEAREST_TO_EDGE)


class QuantisedLinear(nn.Module):
    """codes int8 (rows, columns) with their grid, and a frozen bias (rows,) or None. Replaces Linear or Conv1D."""

    def __init__(self, codes: Tensor, grid: Grid, bias: Tensor | None, moved: MovedCodes | None = None) -> None:
        super().__init__()
        self.codes: Tensor
        self.bias: Tensor | None
        self.zero: Tensor | None
        self.scales: Tensor | None
        self.minimum: Tensor | None
        self.minima: Tensor | None
        self.register_buffer("codes", codes)
        self.register_buffer("bias", bias)
        nested = isinstance(grid.nested, SuperBlocks)
        self.scale = Relative(grid.free_scales, nonzero=True, subnormal=nested)
        self.scheme = grid.scheme
        self.moved = moved
        # The grid's other parts, as buffers so that they go where the module goes.
        made_of = grid.nested if isinstance(grid.nested, SuperBlocks) else None
        for name in ("scales", "minimum", "minima"):
            self.register_buffer(name, getattr(made_of, name, None))
        self.register_buffer("zero", None if nested else grid.zero)

    def grid_at(self, scale: Tensor) -> Grid:
        """The grid with other free scales, float32, which are values of their dtype."""
        scale = scale.to(self.scale.base.dtype)
        if self.scheme.of_super_blocks:
            made_of = SuperBlocks(scale, self.scales, self.minimum, self.minima)
            return Grid.of_super_blocks(self.scheme, made_of)
        return Grid(self.scheme, scale, self.zero)

    def forward(self, inputs: Tensor) -> Tensor:
        """inputs (..., columns) -> (..., rows), in the inputs' dtype."""
        if self.scheme.inputs:
            inputs = inputs + (rounded_inputs(inputs.detach()) - inputs.detach())
        product: Tensor = _Product.apply(  # type: ignore[no-untyped-call]
            inputs,
            self.scale(),
            self.codes,
            self.grid_at,
            None if self.moved is None else self.moved.factor,
        )
        return product if self.bias is None else product + self.bias
