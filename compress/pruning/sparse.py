"""Zeros among the weights of a linear: unstructured, or two of every four in a row (2:4).

Notation: W (rows, columns), H = E[x x^T], U upper triangular with (H + ridge mean(diag H) I)^-1 = U^T U.

sparsegpt   columns from left to right, as GPTQ rounds them: a weight that becomes zero is an error which the columns to
            its right make up for. What goes is what costs least, w_j^2 / U_jj^2, chosen for a few columns at a time so
            that what was made up for so far counts (arXiv 2301.00774).
wanda       |w_j| sqrt(H_jj), row by row; nothing is made up for (arXiv 2306.11695).

Example of 2:4 with H = I: [3, -1, 2, 0.5] becomes [3, 0, 2, 0] by either.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from compress.quantization.target_shift import cholesky_

Pattern = Literal["unstructured", "2:4"]
COLUMNS, TIMES = 128, 8
"""Columns whose zeros are chosen together at most, and times that they are chosen at least; a multiple of four."""


def upper_factor(hessian: Tensor, ridge: float) -> Tensor | None:
    """U float32 (columns, columns) of a Hessian float64, in the order of the columns; None where it has none.

    With J the reversal, L = chol(J H J) gives H = (J L J)(J L J)^T, and U = (J L J)^-1 is upper triangular.
    """
    mean = float(hessian.diagonal().mean())
    if not (0 < mean < float("inf")):
        return None
    damped = hessian.flip(0, 1).contiguous()
    damped.diagonal().add_(ridge * mean)
    lower = cholesky_(damped)
    if lower is None:
        return None
    identity = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
    inverse = torch.linalg.solve_triangular(lower, identity, upper=False)
    upper: Tensor = inverse.flip(0, 1).float()
    return upper


def sparsegpt(weight: Tensor, upper: Tensor, ratio: float, pattern: Pattern) -> Tensor:
    """`weight` (rows, columns) float32 with a share `ratio` of zeros, the rest updated."""
    result = weight.clone()
    step = max(4, min(COLUMNS, weight.shape[1] // TIMES // 4 * 4))
    for start in range(0, weight.shape[1], step):
        stop = min(start + step, weight.shape[1])
        part, factor = result[:, start:stop], upper[start:stop, start:stop]
        errors = torch.empty_like(part)
        zeros = _lowest(_cost(part, factor), ratio) if pattern == "unstructured" else torch.zeros_like(part).bool()
        for column in range(stop - start):
            if pattern == "2:4" and column % 4 == 0:
                four = slice(column, column + 4)
                zeros[:, four] = _two_of_four(_cost(part[:, four], factor[four, four]))
            kept = part[:, column].masked_fill(zeros[:, column], 0)
            errors[:, column] = (part[:, column] - kept) / factor[column, column]
            part[:, column:] -= errors[:, column : column + 1] * factor[column, column:]
            part[:, column] = kept
        result[:, stop:] -= errors @ upper[start:stop, stop:]
    return result


def wanda(weight: Tensor, diagonal: Tensor, ratio: float, pattern: Pattern) -> Tensor:
    """The same without an update; `diagonal` (columns,) of H."""
    scores = weight.abs() * diagonal.clamp_min(0).sqrt().float()
    if pattern == "2:4":
        zeros = _two_of_four(scores.view(-1, 4)).view_as(scores)
    else:
        zeros = torch.zeros_like(scores).bool()
        count = round(ratio * weight.shape[1])
        zeros.scatter_(1, scores.topk(count, dim=1, largest=False).indices, True)
    return weight.masked_fill(zeros, 0)


def _cost(part: Tensor, factor: Tensor) -> Tensor:
    return part.square() / factor.diagonal().square()


def _lowest(scores: Tensor, ratio: float) -> Tensor:
    """True for the share `ratio` of all scores that are lowest."""
    count = round(ratio * scores.numel())
    zeros = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    zeros[scores.flatten().topk(count, largest=False).indices] = True
    return zeros.view_as(scores)


def _two_of_four(scores: Tensor) -> Tensor:
    """True for the lower two of each row's four scores (rows, 4)."""
    zeros = torch.zeros_like(scores, dtype=torch.bool)
    return zeros.scatter_(1, scores.topk(2, dim=1, largest=False).indices, True)
