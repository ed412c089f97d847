"""The factor of a matrix of second moments that rounding with feedback goes by: U with H^-1 = U^T U, damped.

With J the reversal, L = chol(J H J) and M = J L J is upper triangular with H = M M^T; then U = M^-1 is the factor that
GPTQ needs, at half the work of inverting H first. In float64. Columns are taken by descending diag H.

Damping ladder: H + lambda mean(diag H) I, lambda times 1, 3, 10, 30; the one used is recorded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.quantization.target_shift import cholesky_
from compress.quantization.triangular import STEP, block_inverses

DAMPING_LADDER = (1.0, 3.0, 10.0, 30.0)


@dataclass(frozen=True)
class Factor:
    """What one input's Hessian gives every linear that reads the input."""

    order: Tensor
    """(columns,) int64: columns by descending diag H."""
    upper: Tensor
    """U (columns, columns) float32 in that order; H_damped^-1 = U^T U."""
    pivots: Tensor
    """1 / U_jj^2 (columns,) float32, in the original column order."""
    damping: float
    """lambda used, as a fraction of mean(diag H)."""
    dead: int
    """Number of columns with H_jj = 0."""


def factorise(hessian: Tensor, damping: float) -> Factor | None:
    """Factor of a Hessian (columns, columns) float64, or None if no damping on the ladder makes it definite.

    Dead columns get a unit diagonal, which leaves them and everybody else alone. At any time at most one more float64
    matrix of the Hessian's size is alive, and U.
    """
    diagonal = hessian.diagonal()
    if not bool(torch.isfinite(diagonal).all()):
        return None
    dead = diagonal <= 0
    order = torch.argsort(diagonal, descending=True, stable=True)
    backward = order.flip(0)
    mean = float(diagonal.mean()) or 1.0
    for multiple in DAMPING_LADDER:
        strength = damping * multiple
        damped = hessian[backward.unsqueeze(1), backward]
        damped.diagonal().add_(dead[backward].to(damped.dtype) * mean + strength * mean)
        lower = cholesky_(damped)
        if lower is not None:
            pivots = torch.empty_like(diagonal)
            pivots[backward] = lower.diagonal().square()
            return Factor(order, _flipped_inverse(lower), pivots.float(), strength, int(dead.sum()))
        del damped
    return None


def _flipped_inverse(lower: Tensor, step: int = STEP) -> Tensor:
    """U = J L^-1 J float32, which is (J L J)^-1, for a lower triangular L (n, n) float64.

    `step` columns at a time, by substitution in blocks of `step` rows (`triangular`). What lies above them is zero in
    L^-1, so they take the corner of L below: a third of the arithmetic of solving for all rows, and no copy of L.
    """
    size = len(lower)
    upper = torch.zeros(lower.shape, dtype=torch.float32, device=lower.device)
    inverses = block_inverses(lower, step)
    for start in range(0, size, step):
        stop = min(start + step, size)
        panel = torch.eye(size - start, stop - start, dtype=lower.dtype, device=lower.device)
        for first in range(start, size, step):
            last = min(first + step, size)
            solved = panel[first - start : last - start]
            solved.copy_(inverses[first // step] @ solved if first > start else inverses[first // step])
            panel[last - start :].addmm_(lower[last:, first:last], solved, alpha=-1)
        upper[: size - start, size - stop : size - start] = panel.flip(0, 1)
    return upper
