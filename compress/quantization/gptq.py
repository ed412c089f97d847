"""GPTQ: round a weight matrix column by column, letting later columns absorb the error of earlier ones.

Minimises tr[(W - Q) H (W - Q)^T] over codes Q on a fixed grid. W (rows, columns); H = (1/T) sum_t x_t x_t^T
(columns, columns) over T calibration tokens. Source: Frantar et al., "GPTQ" (arXiv 2210.17323).

What differs from the first paper, and why:

- **Static activation order.** Columns are taken by descending diag H, so the most excited are rounded first while all
  others can still compensate; scales stay with their original contiguous groups, so no index is needed at inference.
- **Factorisation.** With J the reversal, L = chol(J H J) and M = J L J is upper triangular with H = M M^T; then
  U = M^-1 is the factor GPTQ needs (H^-1 = U^T U), at half the work of inverting H first. In float64.
- **Damping ladder.** H + lambda mean(diag H) I, lambda times 1, 3, 10, 30; the one used is recorded. If all fail the
  matrix is rounded to nearest, and that is an event.
- **Pivots as importance.** After feedback the cost of an error in column j is M_jj^2 = 1 / U_jj^2, not H_jj. The grid
  search is weighted by it.
- **Dead columns** (H_jj = 0) are rounded, not zeroed: the data seen later may excite them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from compress.quantization.columns import solve_columns
from compress.quantization.gpu import judging
from compress.quantization.grid import Grid, dequantize, quantize
from compress.quantization.grid_search import minmax_grid, search_grid
from compress.quantization.k_quants import k_quant_grid
from compress.quantization.refine import Split, refined
from compress.quantization.scheme import Scheme
from compress.quantization.target_shift import cholesky_
from compress.quantization.triangular import STEP, block_inverses

ScaleSearch = Literal["minmax", "mse", "weighted"]
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


@dataclass(frozen=True)
class Solution:
    """One linear on its grid. error: tr(dW H dW^T) / tr(W H W^T); rounding_error: the same for rounding to nearest."""

    codes: Tensor
    grid: Grid
    error: float
    rounding_error: float
    damping: float | None
    """None if the Hessian could not be factorised and the matrix was rounded."""
    kept_rounding: bool = False
    """True where solving came out worse than rounding to the same grid, and the rounded codes were kept."""
    refined: bool = False
    """True where codes and scales were refined, because tokens not used for it agreed."""


Candidate = tuple[Tensor, Grid]
"""Codes (rows, columns) int8 and their grid."""


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


def solve(
    weights: list[Tensor],
    hessian: Tensor,
    factor: Factor | None,
    scheme: Scheme,
    stored: torch.dtype,
    scales: ScaleSearch = "weighted",
    split: Split | None = None,
    block: int = 64,
) -> list[Solution]:
    """Codes for linears that read the same input, solved as one matrix stacked by rows (rows are independent).

    weights: (rows_i, columns) float32 each; hessian (columns, columns) float64; `stored` is the dtype scales are kept
    in. Never worse than rounding, in the H norm: where it is, the rounded codes are returned. With a `split`
    of the Hessian, codes and scales are refined with one part where the other says that it helps (`refine`).
    """
    if factor is None:
        fallback: ScaleSearch = "mse" if scales == "weighted" else scales
        return [rounded(weight, hessian, scheme, stored, fallback) for weight in weights]
    stacked = torch.cat(weights) if len(weights) > 1 else weights[0]
    grid = choose_grid(stacked, factor.pivots, scheme, stored, scales)
    codes = solve_columns(stacked, factor.order, factor.upper, grid, block)
    refit: Candidate | None = None
    if split is not None:
        refit = refined(stacked, codes, grid, _damped(split.fitted, factor.damping))
    solutions, start = [], 0
    for weight in weights:
        stop = start + weight.shape[0]
        found = codes[start:stop], grid.rows(start, stop)
        accepted = False
        if split is not None and refit is not None:
            other = refit[0][start:stop], refit[1].rows(start, stop)
            losses = [energy(dequantize(*each).float() - weight, split.held_out) for each in (found, other)]
            accepted = losses[1] < losses[0]
            found = other if accepted else found
        solutions.append(_judged(weight, *found, hessian, factor.damping, accepted))
        start = stop
    return solutions


def _damped(hessian: Tensor, damping: float) -> Tensor:
    """H + damping mean(diag H) I, dead columns as in `factorise`."""
    damped = hessian.clone()
    mean = float(hessian.diagonal().mean()) or 1.0
    damped.diagonal().add_(damping * mean + (hessian.diagonal() <= 0).float() * mean)
    return damped


def _judged(weight: Tensor, codes: Tensor, grid: Grid, hessian: Tensor, damping: float, accepted: bool) -> Solution:
    """The better of the solved codes and plain rounding on the same grid, with both errors."""
    nearest = quantize(weight, grid)
    whole = energy(weight, hessian)
    error = relative_error(weight, dequantize(codes, grid), hessian, whole)
    rounding_error = relative_error(weight, dequantize(nearest, grid), hessian, whole)
    if rounding_error < error:
        return Solution(nearest, grid, rounding_error, rounding_error, damping, kept_rounding=True)
    return Solution(codes, grid, error, rounding_error, damping, refined=accepted)


def rounded(
    weight: Tensor, hessian: Tensor | None, scheme: Scheme, stored: torch.dtype, scales: ScaleSearch
) -> Solution:
    """Rounding to nearest. Without a Hessian the error is that of the weights themselves."""
    grid = choose_grid(weight, None, scheme, stored, scales)
    codes = quantize(weight, grid)
    error = relative_error(weight, dequantize(codes, grid), hessian)
    return Solution(codes, grid, error, error, None)


def choose_grid(
    weight: Tensor, importance: Tensor | None, scheme: Scheme, stored: torch.dtype, scales: ScaleSearch
) -> Grid:
    """Scales by the named method; `importance` (columns,) is used by `weighted` only. K-quants keep theirs as their
    type does, whatever `stored` is."""
    if scheme.k_quant:
        return k_quant_grid(weight, importance if scales == "weighted" else None, scheme, scales != "minmax")
    if scales == "minmax":
        return minmax_grid(weight, scheme, stored)
    return search_grid(weight, importance if scales == "weighted" else None, scheme, stored)


def relative_error(weight: Tensor, value: Tensor, hessian: Tensor | None, whole: float | None = None) -> float:
    """tr(dW H dW^T) / tr(W H W^T), or the squared Frobenius ratio if there is no (finite) Hessian.

    `whole`: tr(W H W^T), where it is known.
    """
    difference = value.float() - weight
    if hessian is None or not bool(torch.isfinite(hessian.diagonal()).all()):
        return float(difference.square().sum() / weight.square().sum().clamp_min(1e-30))
    whole = energy(weight, hessian) if whole is None else whole
    return energy(difference, hessian) / max(whole, 1e-30)


def energy(rows: Tensor, hessian: Tensor) -> float:
    """tr(A H A^T) of A (rows, columns) float32, at least 0."""
    with judging(rows.device):
        product = rows @ hessian.float()
    return max(float(product.mul_(rows).sum(dtype=torch.float64)), 0.0)
