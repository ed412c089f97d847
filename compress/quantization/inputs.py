"""Linears whose inputs are integers too: W8A8, and LLM.int8 with its columns of outliers.

A token's inputs x (columns,) are rounded to q = round(x / s) in [-128, 127] with a scale s = max|x| / range of its own,
and the product with the weights' codes is taken in integers:

    y = s * scale * sum_j q_j z_j          q_j, z_j int8, the sum int32, s and scale float32

`range` is 127 where vLLM's and bitsandbytes' kernels run, and 127.5 in compressed-tensors' own forward in transformers
(its range is 255 wide, halved). LLM.int8 (Dettmers et al., arXiv 2208.07339) takes columns in which any input of the
call reaches a threshold out of this, and multiplies them in 16 or 32 bits by the weights' values.

The integer product is `torch._int_mm` on a GPU. A CPU has no fast one everywhere, so there float32 does the same sums:
a product of at most `EXACT_COLUMNS` columns stays below 2^24, so every partial sum is an integer that float32 holds.

Example: x = [1.0, -0.5], range 127: s = 0.00787, q = [127, -64] (63.5 is rounded to even); with z = [2, 1] the sum is
190 and y = 1.496 times the weights' scale; without rounding it were 1.5.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

SERVED = 127.0
"""Range of the kernels that serve such models."""
LOADED = 127.5
"""Range of compressed-tensors' forward in transformers."""
EXACT_COLUMNS = 1024
"""128 x 127 x 1024 < 2^24."""
_LEAST_ROWS, _MULTIPLE = 32, 8
"""CUDA's `_int_mm` takes more than 16 rows, and columns and outputs in multiples of 8."""


def quantize_inputs(inputs: Tensor, range_: float = SERVED) -> tuple[Tensor, Tensor]:
    """Codes int8 (tokens, columns) of inputs (tokens, columns), and scales float32 (tokens, 1)."""
    values = inputs.float()
    scale = values.abs().amax(-1, keepdim=True).div_(range_).clamp_min_(torch.finfo(torch.float32).tiny)
    return values.div(scale).round_().clamp_(-128, 127).to(torch.int8), scale


def rounded_inputs(inputs: Tensor, range_: float = SERVED) -> Tensor:
    """What is left of inputs (..., columns) of any float dtype once they were integers; the same dtype."""
    codes, scale = quantize_inputs(inputs.flatten(0, -2), range_)
    return (codes * scale).to(inputs.dtype).view(inputs.shape)


def integer_product(left: Tensor, right: Tensor) -> Tensor:
    """left (m, k) int8 times right (n, k) int8 transposed: int32 (m, n), exact."""
    if left.device.type == "cuda":
        wide, tall = padded(left, right)
        return torch._int_mm(wide, tall.T)[: left.shape[0], : right.shape[0]]
    total = torch.zeros(left.shape[0], right.shape[0], dtype=torch.int32, device=left.device)
    # Exact also where the forward around it is in mixed precision.
    with torch.autocast(left.device.type, enabled=False):
        for start in range(0, left.shape[1], EXACT_COLUMNS):
            part = slice(start, start + EXACT_COLUMNS)
            total += (left[:, part].float() @ right[:, part].float().T).to(torch.int32)
    return total


def padded(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """left (m, k), right (n, k) with zeros added until CUDA takes them; the product is in the corner of theirs."""
    (rows, columns), outputs = left.shape, right.shape[0]
    more = -columns % _MULTIPLE
    wide = torch.nn.functional.pad(left, (0, more, 0, max(0, _LEAST_ROWS - rows)))
    return wide, torch.nn.functional.pad(right, (0, more, 0, -outputs % _MULTIPLE))


@dataclass(frozen=True)
class IntegerLinear:
    """The forward of a linear on integer inputs. codes int8 (rows, columns); scale (rows, 1); bias (rows,) or None."""

    codes: Tensor
    scale: Tensor
    outliers: float | None = None
    range: float = SERVED

    def __call__(self, inputs: Tensor, bias: Tensor | None) -> Tensor:
        """Outputs (..., rows) in the dtype of inputs (..., columns)."""
        flat = inputs.flatten(0, -2)
        beside: Tensor | None = None
        if self.outliers is None:
            codes, steps = quantize_inputs(flat, self.range)
        else:
            # As the library does: from float16, scales from what stays below the threshold, wherever it is.
            halved = flat.half()
            large = halved.abs() >= self.outliers
            codes, steps = quantize_inputs(halved.masked_fill(large, 0), self.range)
            columns = large.any(0)
            if bool(columns.any()):
                codes[:, columns] = 0
                beside = flat[:, columns] @ (self.codes[:, columns] * self.scale).to(flat.dtype).T
        outputs = integer_product(codes, self.codes).float() * steps * self.scale.float().T
        if beside is not None:
            outputs = outputs + beside.float()
        if bias is not None:
            outputs = outputs + bias.float()
        return outputs.to(inputs.dtype).view(*inputs.shape[:-1], len(self.codes))


class _Switch:
    """The forward of a linear that may change while a call of it is under way.

    torch takes a module's forward before it runs pre-hooks, and the walk is held in a pre-hook while weights are
    solved. So what it takes must be something that looks up, once the call goes on, what the linear has become.
    """

    def __init__(self, linear: nn.Module) -> None:
        self.linear = linear
        self.instead: Callable[[Tensor], Tensor] | None = None

    def __call__(self, inputs: Tensor) -> Tensor:
        if self.instead is not None:
            return self.instead(inputs)
        found: Tensor = type(self.linear).forward(self.linear, inputs)
        return found


def may_run_on_integers(linear: nn.Module) -> None:
    """Prepare a linear whose forward may be changed by `run_on_integers` in the middle of a call."""
    _switch_of(linear)


def _switch_of(linear: nn.Module) -> _Switch:
    switch = linear.__dict__.get("forward")
    if not isinstance(switch, _Switch):
        switch = _Switch(linear)
        linear.forward = switch
    return switch


def run_on_integers(linear: nn.Module, forward: IntegerLinear) -> None:
    """Make a linear compute with `forward` in place of its weight, until `run_as_before`. Hooks keep working."""
    bias = linear._parameters["bias"]
    _switch_of(linear).instead = lambda inputs: forward(inputs, bias)


def run_as_loaded(linear: nn.Module) -> None:
    """Make a linear compute as compressed-tensors does in transformers, until `run_as_before`: with rounded inputs and
    the weight's values, in floating point."""
    _switch_of(linear).instead = lambda inputs: type(linear).forward(linear, rounded_inputs(inputs, LOADED))


def run_as_before(module: nn.Module) -> None:
    """Undo either in a module and all below it."""
    for child in module.modules():
        child.__dict__.pop("forward", None)
