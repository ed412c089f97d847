"""What a GPU does otherwise than a CPU: Triton kernels where they are installed, and TF32 where errors are judged.

TF32 rounds the operands of a product to 11 significant bits and sums in float32, at some six times the rate of float32
on the tensor cores of Ampere and later. A quadratic form of millions of terms keeps four digits and more: enough to
say which of two candidates is better, and to print. What decides codes column by column stays in float32, or is made of
three products in TF32 (`fine_product`), which together keep float32's digits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import torch
from torch import Tensor


def gpu_kernels(device: torch.device) -> bool:
    """Whether Triton's kernels run: on a GPU, where triton is installed."""
    return device.type == "cuda" and find_spec("triton") is not None


@contextmanager
def judging(device: torch.device) -> Iterator[None]:
    """Products of float32 in TF32 on a GPU; on a CPU nothing changes."""
    if device.type != "cuda":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


_TF32_BITS, _HALF_A_STEP = -(1 << 13), 1 << 12
"""Mask of the bits of a float32 that TF32 keeps, and half of the last of them."""


def fine_product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right to float32's precision; on a GPU from three products of TF32, at twice the rate of one in float32.

    Each operand is taken apart, x = x_1 + x_2 with x_1 its nearest number of TF32; x_2 y_2, at most 2^-22 of x y and of
    either sign, is left out.
    """
    if left.device.type != "cuda":
        return left @ right
    (coarse, rest), (other_coarse, other_rest) = _halves(left), _halves(right)
    with judging(left.device):
        return (rest @ other_coarse).addmm_(coarse, other_rest).addmm_(coarse, other_coarse)


def add_product(work: Tensor, left: Tensor, right: Tensor, sign: int) -> None:
    """work += sign left @ right, in float32's precision as `fine_product`, in the memory of `work`."""
    if work.device.type != "cuda":
        work.addmm_(left, right, alpha=sign)
        return
    (coarse, rest), (other_coarse, other_rest) = _halves(left), _halves(right)
    with judging(work.device):
        work.addmm_(rest, other_coarse, alpha=sign).addmm_(coarse, other_rest, alpha=sign)
        work.addmm_(coarse, other_coarse, alpha=sign)


def _halves(values: Tensor) -> tuple[Tensor, Tensor]:
    coarse = values.contiguous().view(torch.int32).add(_HALF_A_STEP).bitwise_and_(_TF32_BITS).view(torch.float32)
    return coarse, values - coarse
