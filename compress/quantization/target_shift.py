"""Move a linear's target so that it undoes part of the error already in its inputs and beside it.

After some blocks have been compressed a linear sees inputs x that differ from the source model's x~. Reproducing W x
then faithfully reproduces the error. What should be reproduced is W x~:

    min_Q E||W x~ - Q x||^2   is solved without a grid by   W* = W + W D H^-1,   D = E[(x~ - x) x^T],  H = E[x x^T]

and GPTQ then rounds W* instead of W. Where the output is added to a residual stream r that differs from the source's
r~, the sum is what counts, and it can make up for that too: W* += R H^-1, R = E[(r~ - r) x^T]. The full steps over-fit
the calibration tokens, so only shares alpha and beta are taken, with a ridge on H:

    W* = W + (alpha W D + beta R) (H + ridge mean(diag H) I)^-1

Sources: quantization error propagation, arXiv 2504.09629; the residual term is LoaQ's.

Example with one column: W = 2, x~ = 1.1, x = 1.0 on every token: D = 0.1, H = 1, so W* = 2.2 for alpha 1 and no ridge.
If moreover r~ - r = 0.05 on every token, R = 0.05, and beta 1 gives W* = 2.25.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

RIDGE = 0.1
"""Fraction of mean(diag H); the value quantization error propagation uses, see docs/adr/0010-target-shift.md."""
TOKENS_PER_COLUMN = 4
"""With fewer calibration tokens per input column the shift over-corrects and is left out."""


@dataclass(frozen=True)
class Mismatch:
    """Means over the tokens for which the source's activations are known, float64."""

    hessian: Tensor
    """H = E[x x^T] (columns, columns)."""
    cross: Tensor
    """D = E[(x~ - x) x^T] (columns, columns)."""
    residual: Tensor | None
    """R = E[(r~ - r) x^T] (hidden, columns), or None where the output is not simply added to the residual stream."""
    tokens: int


@dataclass(frozen=True)
class Shift:
    """What moves targets: W* = W + W @ factor + offset, float32."""

    factor: Tensor
    """(columns, columns)."""
    offset: Tensor | None
    """(rows, columns), the same for every linear that reads the input; None without a residual term."""

    def target(self, weight: Tensor) -> Tensor:
        """W* (rows, columns) float32 for W (rows, columns) float32."""
        moved = torch.addmm(weight, weight, self.factor)
        return moved if self.offset is None else moved.add_(self.offset)


ROWS_AT_ONCE = 512
"""Rows of a moment that are divided by H together; rows are independent."""


def shift_of(mismatch: Mismatch, alpha: float, beta: float, ridge: float = RIDGE) -> Shift | None:
    """The shift for shares `alpha` of D and `beta` of R, or None if the damped H cannot be factorised.

    H is factorised in its own memory: `mismatch.hessian` holds something else afterwards.
    """
    mean = float(mismatch.hessian.diagonal().mean())
    if not (mean > 0 and mean < float("inf")):
        return None
    residual = mismatch.residual if beta else None
    if not (_finite(mismatch.cross) and (residual is None or _finite(residual))):
        return None
    mismatch.hessian.diagonal().add_(ridge * mean)
    lower = cholesky_(mismatch.hessian)
    if lower is None:
        return None
    return Shift(
        _right_divided(mismatch.cross, lower, alpha),
        None if residual is None else _right_divided(residual, lower, beta),
    )


def cholesky_(matrix: Tensor) -> Tensor | None:
    """L with L L^T = `matrix` (n, n), symmetric and contiguous, in the memory of `matrix`; None if it is not positive
    definite, with `matrix` overwritten all the same."""
    # Its transpose has the same values and is stored by columns, as LAPACK wants it: no copy is made.
    lower = matrix.T
    failed = torch.empty((), dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(lower, out=(lower, failed))
    return None if int(failed) or not bool(torch.isfinite(lower.diagonal()).all()) else lower


def _finite(matrix: Tensor) -> bool:
    """Whether all values are finite: a sum is not where one of them is not, and takes no memory of their size."""
    return bool(torch.isfinite(matrix.sum()))


def _right_divided(moment: Tensor, lower: Tensor, share: float) -> Tensor:
    """share moment (A)^-1 float32 (rows, columns) with A = lower lower^T symmetric: (A^-1 moment^T)^T."""
    result = torch.empty(moment.shape, dtype=torch.float32, device=moment.device)
    for start in range(0, len(moment), ROWS_AT_ONCE):
        # Not cholesky_solve, which makes a copy of L each time.
        half = torch.linalg.solve_triangular(lower, moment[start : start + ROWS_AT_ONCE].T, upper=False)
        whole = torch.linalg.solve_triangular(lower.T, half, upper=True)
        result[start : start + ROWS_AT_ONCE] = whole.T.mul_(share)
    return result
