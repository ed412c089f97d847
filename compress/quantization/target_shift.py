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

from compress.quantization.gpu import fine_product, judging
from compress.quantization.triangular import block_inverses, divided_by_square

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
        # On a GPU in TF32: what is added is a few hundredths of W.
        with judging(weight.device):
            moved = torch.addmm(weight, weight, self.factor)
        return moved if self.offset is None else moved.add_(self.offset)


ROWS_AT_ONCE = 512
"""Rows of a moment that are divided by H together; rows are independent."""
GPU_ROWS_AT_ONCE = 4096
"""The same on a GPU."""
PANEL = 2048
"""Rows of D that are brought to float32 together."""


def shift_of(mismatch: Mismatch, alpha: float, beta: float, ridge: float = RIDGE) -> Shift | None:
    """The shift for shares `alpha` of D and `beta` of R, or None if the damped H cannot be factorised.

    H is factorised in its own memory: `mismatch.hessian` holds something else afterwards.
    """
    residual = mismatch.residual if beta else None
    lower = _damped_factor(mismatch, residual, ridge)
    if lower is None:
        return None
    inverses = block_inverses(lower)
    return Shift(
        _right_divided(mismatch.cross, lower, inverses, alpha),
        None if residual is None else _right_divided(residual, lower, inverses, beta),
    )


def targets_of(
    mismatch: Mismatch, weights: list[Tensor], alpha: float, beta: float, ridge: float = RIDGE
) -> list[Tensor] | None:
    """W* (rows_i, columns) float32 of linears that read one input, W (rows_i, columns) float32; None as in `shift_of`.

    The same as the target of each by `shift_of`. Where together they have fewer rows than columns, what is divided by H
    is their own moment alpha W D + beta R, and not the larger D.
    """
    if sum(len(weight) for weight in weights) >= len(mismatch.hessian):
        shift = shift_of(mismatch, alpha, beta, ridge)
        return None if shift is None else [shift.target(weight) for weight in weights]
    residual = mismatch.residual if beta else None
    lower = _damped_factor(mismatch, residual, ridge)
    if lower is None:
        return None
    inverses, targets = block_inverses(lower), []
    for weight in weights:
        moment = _times(weight, mismatch.cross).mul_(alpha)
        if residual is not None:
            moment.add_(residual, alpha=beta)
        targets.append(weight + _right_divided(moment, lower, inverses, 1.0))
    return targets


def _times(weight: Tensor, cross: Tensor) -> Tensor:
    """W D float64 (rows, columns) of W float32 and D float64: float32 products, a panel of D at a time."""
    moment = torch.zeros(len(weight), cross.shape[1], dtype=torch.float64, device=weight.device)
    for start in range(0, len(cross), PANEL):
        part = slice(start, start + PANEL)
        moment += fine_product(weight[:, part], cross[part].float())
    return moment


def _damped_factor(mismatch: Mismatch, residual: Tensor | None, ridge: float) -> Tensor | None:
    """L with L L^T = H + ridge mean(diag H) I, in the memory of H; None where a sum is not finite or there is no L."""
    mean = float(mismatch.hessian.diagonal().mean())
    if not (mean > 0 and mean < float("inf")):
        return None
    if not (_finite(mismatch.cross) and (residual is None or _finite(residual))):
        return None
    mismatch.hessian.diagonal().add_(ridge * mean)
    return cholesky_(mismatch.hessian)


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


def _right_divided(moment: Tensor, lower: Tensor, inverses: list[Tensor], share: float) -> Tensor:
    """share moment A^-1 float32 (rows, columns) with A = L L^T; `inverses` are those of L's diagonal blocks."""
    result = torch.empty(moment.shape, dtype=torch.float32, device=moment.device)
    at_once = GPU_ROWS_AT_ONCE if moment.is_cuda else ROWS_AT_ONCE
    for start in range(0, len(moment), at_once):
        part = slice(start, start + at_once)
        result[part] = divided_by_square(moment[part].clone(), lower, inverses).mul_(share)
    return result
