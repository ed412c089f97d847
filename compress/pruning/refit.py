"""What the columns that stay must become: least squares against the output that the whole linear had.

Notation: T (rows, columns) the weight whose output is wanted, H = E[x x^T], K the columns that stay, R those that go:

    min_V E|T x - V x_K|^2 + lambda |V - T_K|^2    gives    V = T_K + T_R H_RK (H_KK + lambda I)^-1

lambda = ridge mean(diag H). No bias is added: what R put out on average is made up for by K as far as K is correlated
with it (arXiv 2203.14788 and others do the same for convolutions).

Example with two equal inputs, H = [[1, 1], [1, 1]]: removing the second of T = [2, 3] gives V = [5] without a ridge.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.quantization.target_shift import cholesky_


@dataclass(frozen=True)
class Refitted:
    """weight (rows, kept) float32. Errors are of the output, tr(E H E^T) / tr(T H T^T), with and without refitting."""

    weight: Tensor
    error: float
    plain_error: float


def refitted(target: Tensor, hessian: Tensor, kept: Tensor, ridge: float) -> Refitted | None:
    """`target` (rows, columns) float32 on the columns `kept` (ascending int64); hessian (columns, columns) float64.

    None where the damped H_KK cannot be factorised.
    """
    gone = torch.ones(target.shape[1], dtype=torch.bool, device=target.device)
    gone[kept] = False
    removed = gone.nonzero().flatten()
    mean = float(hessian.diagonal().mean())
    inside = hessian[kept][:, kept]
    inside.diagonal().add_(ridge * mean)
    lower = cholesky_(inside)
    if lower is None:
        return None
    wanted = target.double()
    across = wanted[:, removed] @ hessian[removed][:, kept]
    change = torch.cholesky_solve(across.T, lower).T
    weight = (wanted[:, kept] + change).float()
    return Refitted(weight, output_error(target, weight, hessian, kept), output_error(target, None, hessian, kept))


def output_error(target: Tensor, weight: Tensor | None, hessian: Tensor, kept: Tensor) -> float:
    """tr(E H E^T) / tr(T H T^T), E = T on the columns that go and T_K - `weight` (0 if None) on those that stay."""
    difference = target.double().clone()
    difference[:, kept] -= difference[:, kept] if weight is None else weight.double()
    power = float(((target.double() @ hessian) * target).sum())
    return float(((difference @ hessian) * difference).sum()) / power if power > 0 else 0.0
