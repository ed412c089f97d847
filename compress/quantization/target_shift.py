"""Move a linear's target so that it undoes part of the error already in its inputs.

After some blocks have been compressed a linear sees inputs x that differ from the source model's x~. Reproducing W x
then faithfully reproduces the error. What should be reproduced is W x~:

    min_Q E||W x~ - Q x||^2   is solved without a grid by   W* = W + W D H^-1,   D = E[(x~ - x) x^T],  H = E[x x^T]

and GPTQ then rounds W* instead of W. The full step over-fits the calibration tokens, so only a share `alpha` of it is
taken, with a ridge on H: W* = W + alpha W D (H + ridge mean(diag H) I)^-1.
Source: quantization error propagation, arXiv 2504.09629.

Example with one column: W = 2, x~ = 1.1, x = 1.0 on every token: D = 0.1, H = 1, so W* = 2.2 for alpha 1 and no ridge.
"""

from __future__ import annotations

import torch
from torch import Tensor

RIDGE = 0.1
"""Fraction of mean(diag H); best of {0.05, 0.1} for alpha 0.5 in ../adr/0004-scale-search.md's sources."""
TOKENS_PER_COLUMN = 4
"""With fewer calibration tokens per input column the shift over-corrects and is left out."""


def shift_factor(hessian: Tensor, cross: Tensor, alpha: float) -> Tensor | None:
    """alpha D (H + ridge)^-1, float32 (columns, columns), or None if H cannot be factorised.

    hessian, cross: (columns, columns) float64, means over the same tokens. W* = W + W @ factor.
    """
    mean = float(hessian.diagonal().mean())
    if not (mean > 0 and mean < float("inf")):
        return None
    damped = hessian.clone()
    damped.diagonal().add_(RIDGE * mean)
    lower, failed = torch.linalg.cholesky_ex(damped)
    if int(failed) or not bool(torch.isfinite(cross).all()):
        return None
    # D A^-1 = (A^-1 D^T)^T, A symmetric.
    return (alpha * torch.cholesky_solve(cross.T.contiguous(), lower).T).float()
