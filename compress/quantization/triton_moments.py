"""The moments of a row's codes between groups, which a joint fit of its scales solves with, in one launch.

    A[row, g, h] = z_g H_gh z_h      z_g the row's codes of group g, H_gh the block of H between two groups

Torch needs a product for each g, whose result is as large as the weights and is read again to be multiplied by the
codes and summed. Here a program takes a few rows and one g, and walks along h; no result leaves the registers. Codes
are integers below 256, which bfloat16 holds exactly; H is rounded to it, an error without direction of 2^-9 in each of
the width^2 terms of a sum. Scales that are fitted with it are kept only where the exact error is smaller.

Example: one row, groups of one column, z = [1, 2], H = [[4, 1], [1, 3]]: A = [[4, 2], [2, 12]].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

WIDTHS = (16, 32, 64, 128)
"""Group widths that the kernel takes."""


def moments(integers: Tensor, hessian: Tensor, factors: torch.dtype = torch.bfloat16) -> Tensor:
    """Lower triangles of A, float32 (rows, groups, groups), zero above; integers int16 (rows, groups, width), codes
    with zero points taken off; hessian float32 (columns, columns); `factors`: what both are multiplied as."""
    rows, groups, width = integers.shape
    integers, hessian = integers.to(factors).contiguous(), hessian.to(factors).contiguous()
    found = torch.zeros(rows, groups, groups, dtype=torch.float32, device=integers.device)
    how = options(width)
    _moments[(triton.cdiv(rows, how["ROWS"]), groups)](integers, hessian, found, rows, groups, WIDTH=width, **how)
    return found


def options(width: int) -> dict[str, int]:
    """Rows of a program, and how it is compiled. Wide groups take fewer rows, to fit the memory of smaller GPUs."""
    return {"ROWS": 64 if width >= 128 else 128, "num_warps": 4, "num_stages": 2}


@triton.jit  # type: ignore[untyped-decorator]
def _moments(
    integers: tl.tensor,
    hessian: tl.tensor,
    found: tl.tensor,
    rows: tl.tensor,
    groups: tl.tensor,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """integers (rows, groups, WIDTH) and hessian (groups WIDTH, groups WIDTH) of one dtype, found float32 (rows,
    groups, groups), as pointers."""
    # The last groups have the most to do, and start first.
    group = groups - 1 - tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = row < rows
    inside = tl.arange(0, WIDTH)
    columns = groups * WIDTH
    own = row.to(tl.int64)[:, None] * columns
    left = tl.load(integers + own + group * WIDTH + inside[None, :], mask=real[:, None], other=0.0)
    line = (group * WIDTH + inside).to(tl.int64)[:, None] * columns
    into = found + row.to(tl.int64) * groups * groups + group * groups
    for other in range(0, group + 1):
        block = tl.load(hessian + line + other * WIDTH + inside[None, :])
        right = tl.load(integers + own + other * WIDTH + inside[None, :], mask=real[:, None], other=0.0)
        product = tl.dot(left, block) * right.to(tl.float32)
        tl.store(into + other, tl.sum(product, axis=1), mask=real)
