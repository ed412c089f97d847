"""A batch's rows as 8-bit integers, so that a CPU sums their outer products four times as fast as in float32.

H of rows x is a sum of outer products. Summed over rows that are rounded, exactly, it is that of the rounded rows: as
positive as any H, and other than H by what the roundings are, which have no direction. Rounding the *sum* (as a CPU
does that multiplies in bfloat16) has no such bound: H of `o_proj` in SmolLM2-135M then has directions of a negative
square.
Products of 8-bit integers add up in 32 bits without any rounding, whatever the order and the threads. On processors
with VNNI, that is: older ones add pairs up in 16 bits, which run over, so `exact_here` asks first.

A column's largest entry is 127 steps. Some tokens have activations hundreds of times as large as others' (the first of
a text, delimiters), and would leave the rest no digits: a 64th of a batch's tokens, those whose entries lie farthest
out, stay in float32, with a product of their own. Of eight batches of 1,024 tokens of SmolLM2-135M H so summed is
within 2 to 7 % of the exact one in every direction, by the norm that a damping of 0.01 gives (26 % for `down_proj` of
the first block; with sums in bfloat16 up to 850 %).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

APART = 64
"""One token of so many stays as it is."""
LARGEST = 127
_EXACT_TOKENS = (2**31 - 1) // LARGEST**2
"""What a 32-bit sum holds of the largest products."""


@dataclass(frozen=True)
class IntegerRows:
    """rows (tokens, columns) ~ integers * scale, but for the few in `apart`."""

    integers: Tensor
    """int8 (tokens, columns); zero where a token is apart."""
    scale: Tensor
    """float32 (columns,): the size of a step."""
    apart: Tensor
    """float32 (few, columns)."""

    def __len__(self) -> int:
        """Tokens, those apart among them."""
        return len(self.integers)

    def columns(self, which: slice) -> IntegerRows:
        return IntegerRows(self.integers[:, which], self.scale[which], self.apart[:, which])


@cache
def exact_here() -> bool:
    """Whether products of 8-bit integers are exact on this CPU, and fast: oneDNN's are with VNNI or AMX."""
    there = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not (there and torch.backends.mkldnn.enabled):
        return False
    signs = torch.arange(64 * 40).view(64, 40).remainder(7).gt(2)
    largest = torch.where(signs, LARGEST, -LARGEST).to(torch.int8)
    # Of float64, whose products are exact here; integers of 64 bits have no fast product.
    return torch.equal(torch._int_mm(largest.T, largest).double(), largest.double().T @ largest.double())


def rounded(*batches: Tensor) -> list[IntegerRows]:
    """Each of several float32 (tokens, columns) of the same tokens as integers, with the same tokens apart in all.

    Entries that are not finite leave their column's scale not finite, so that no sum hides them.
    """
    sizes = [rows.abs() for rows in batches]
    means = [size.mean(0).clamp_min_(torch.finfo(torch.float32).tiny) for size in sizes]
    farthest = [size.div_(mean).amax(1) for size, mean in zip(sizes, means, strict=True)]
    tokens = len(batches[0])
    chosen = torch.zeros(tokens, dtype=torch.bool)
    # Of each of the batches: what is usual in one may be far out in another.
    for each in farthest:
        chosen[each.topk(-(-tokens // APART)).indices] = True
    apart = chosen.nonzero().squeeze(1)
    found = []
    for rows, size, mean in zip(batches, sizes, means, strict=True):
        size[apart] = 0
        scale = size.amax(0).mul_(mean).div_(LARGEST) if tokens else torch.zeros_like(mean)
        scale[scale == 0] = 1
        integers = torch.div(rows, scale, out=size).round_().clamp_(-LARGEST, LARGEST).to(torch.int8)
        integers[apart] = 0
        found.append(IntegerRows(integers, scale, rows[apart]))
    return found


def product(left: IntegerRows, right: IntegerRows) -> Tensor:
    """left^T right float32 (left's columns, right's columns), of rows that were rounded together."""
    total: Tensor | None = None
    for start in range(0, max(1, len(left)), _EXACT_TOKENS):
        few = slice(start, start + _EXACT_TOKENS)
        turned = left.integers[few].T
        if len(turned) == 1:  # torch 2.13 goes by the strides of a view of one row, which say nothing
            turned = turned.clone(memory_format=torch.contiguous_format)
        # An integer product holds its exact sum; as float32 it is rounded once, as any product of a batch.
        part = torch.mul(torch._int_mm(turned, right.integers[few]), right.scale).mul_(left.scale.unsqueeze(1))
        total = part if total is None else total.add_(part)
    assert total is not None
    return total.addmm_(left.apart.T, right.apart)
