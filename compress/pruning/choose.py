"""Which pieces of a linear's input can go: channels of an MLP, or KV heads with the query heads they serve.

Notation: W (rows, columns) the linear that reads the pieces, H = E[x x^T] (columns, columns) of its input x, a piece a
run of `width` columns. S are the columns of a piece, G = (H + ridge mean(diag H) I)^-1.

obs          what removing S adds to the output error when all other columns make up for it as well as they can,
                 tr(W_S (G_SS)^-1 W_S^T)          (Optimal Brain Surgeon; in blocks: ZipLM, arXiv 2302.04089)
             taken greedily: the lowest few pieces go, W and G are brought up to date, and so on
activation   sum over S of |x_j| |W_j|_1          (Wanda's score, arXiv 2306.11695, summed over the rows)
magnitude    sum over S of |W_j|_2, with the rows of the linears that put the piece out

Example with H = I: obs is |W_S|^2, and nothing can make up for anything.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Importance = Literal["obs", "activation", "magnitude"]
AT_ONCE, UPDATES = 16, 16
"""Channels that go between two updates at most, and updates at least; wider pieces go one by one."""


def columns_of(pieces: Tensor, width: int) -> Tensor:
    """Column numbers (pieces * width,) of pieces (int64), in their order."""
    return (pieces.unsqueeze(1) * width + torch.arange(width, device=pieces.device)).flatten()


def kept_by_obs(weight: Tensor, hessian: Tensor, width: int, keep: int, ridge: float) -> Tensor | None:
    """Numbers of `keep` pieces, ascending, chosen as above; None where H cannot be inverted, or scores are no numbers.

    weight (rows, columns) float32, hessian (columns, columns) float64; both are left as they are.
    """
    mean = float(hessian.diagonal().mean())
    if not (0 < mean < float("inf")):
        return None
    damped = hessian.clone()
    damped.diagonal().add_(ridge * mean)
    lower, failed = torch.linalg.cholesky_ex(damped)
    if int(failed):
        return None
    inverse = torch.cholesky_inverse(lower).float()
    del damped, lower
    weight = weight.clone()
    left = torch.ones(len(inverse) // width, dtype=torch.bool, device=weight.device)
    step = min(AT_ONCE, max(1, (len(left) - keep) // UPDATES)) if width == 1 else 1
    while (excess := int(left.sum()) - keep) > 0:
        scores = _obs(weight, inverse, width)
        if not bool(torch.isfinite(scores[left]).all()):
            return None
        scores = scores.masked_fill_(~left, float("inf"))
        gone = scores.topk(min(step, excess), largest=False).indices
        columns = columns_of(gone, width)
        # G_SS^-1 G_S:, with which the others make up for S, and by which G forgets it.
        update = torch.linalg.solve(inverse[columns][:, columns], inverse[columns])
        weight -= weight[:, columns] @ update
        inverse -= inverse[:, columns] @ update
        # What is gone stays gone: exact zeros, and a diagonal that can be divided by.
        weight[:, columns] = 0
        inverse[columns] = 0
        inverse[:, columns] = 0
        inverse[columns, columns] = 1
        left[gone] = False
    return left.nonzero().flatten()


def _obs(weight: Tensor, inverse: Tensor, width: int) -> Tensor:
    """tr(W_S (G_SS)^-1 W_S^T) of every piece, (pieces,) float32."""
    if width == 1:
        return weight.square().sum(0) / inverse.diagonal()
    count = len(inverse) // width
    own = torch.stack([inverse[at : at + width, at : at + width] for at in range(0, len(inverse), width)])
    parts = weight.T.reshape(count, width, -1)
    scores: Tensor = (parts * torch.linalg.solve(own, parts)).sum((1, 2))
    return scores


def kept_by_activation(weight: Tensor, hessian: Tensor, width: int, keep: int) -> Tensor:
    """Numbers of the `keep` pieces with the largest |x| |W|_1, ascending."""
    scores = hessian.diagonal().clamp_min(0).sqrt().float() * weight.abs().sum(0)
    return _largest(scores, width, keep)


def kept_by_magnitude(weight: Tensor, written: Tensor, width: int, keep: int) -> Tensor:
    """Numbers of the `keep` pieces with the largest norms, ascending; `written` (pieces,): norms of the rows that put
    each piece out."""
    norms = weight.T.reshape(-1, width * len(weight)).norm(dim=1)
    return _largest(norms + written, 1, keep)


def _largest(scores: Tensor, width: int, keep: int) -> Tensor:
    return scores.view(-1, width).sum(1).topk(keep).indices.sort().values
