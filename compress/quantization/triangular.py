"""Solving with a triangular matrix by products alone: only its diagonal blocks are inverted.

A triangular solver handles a block at a time and little of a GPU (17 of 57 TFLOP/s of float64 on an H200, n = 14336);
the same substitution in products of `STEP` columns reaches what products reach. In float64.

With L = [[A, 0], [B, C]]: Y L^T = M is Y_1 = M_1 A^-T, then Y_2 = (M_2 - Y_1 B^T) C^-T.
"""

from __future__ import annotations

import torch
from torch import Tensor

STEP = 512
"""Columns of a diagonal block."""


def block_inverses(lower: Tensor, step: int = STEP) -> list[Tensor]:
    """Inverses of the diagonal blocks of a lower triangular matrix (n, n), each (step, step) but perhaps the last."""
    found = []
    for first in range(0, len(lower), step):
        corner = lower[first : first + step, first : first + step]
        one = torch.eye(len(corner), dtype=lower.dtype, device=lower.device)
        found.append(torch.linalg.solve_triangular(corner, one, upper=False))
    return found


def divided_by_square(moment: Tensor, lower: Tensor, inverses: list[Tensor], step: int = STEP) -> Tensor:
    """moment (rows, n) times (L L^T)^-1, in the memory of `moment`, for L (n, n) and its `block_inverses`."""
    starts = range(0, len(lower), step)
    for first, inverse in zip(starts, inverses, strict=True):
        last = first + len(inverse)
        here = moment[:, first:last]
        here.copy_(here @ inverse.T)
        if last < len(lower):
            moment[:, last:].addmm_(here, lower[last:, first:last].T, alpha=-1)
    for first, inverse in zip(reversed(starts), reversed(inverses), strict=True):
        here = moment[:, first : first + len(inverse)]
        here.copy_(here @ inverse)
        if first:
            moment[:, :first].addmm_(here, lower[first : first + len(inverse), :first], alpha=-1)
    return moment
