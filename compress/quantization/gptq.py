"""GPTQ: round a weight matrix column by column, letting later columns absorb the error of earlier ones.

Minimises tr[(W - Q) H (W - Q)^T] over codes Q on a fixed grid. W (rows, columns); H = (1/T) sum_t x_t x_t^T
(columns, columns) over T calibration tokens. Source: Frantar et al., "GPTQ" (arXiv 2210.17323).

What differs from the first paper, and why:

- **Static activation order.** Columns are taken by descending diag H, so the most excited are rounded first while all
  others can still compensate; scales stay with their original contiguous groups, so no index is needed at inference.
- **Factorisation** in float64 at half the work of inverting H first, with a ladder of dampings (`factor`). If all fail
  the matrix is rounded to nearest, and that is an event.
- **Feedback along rows too**, where it is known how outputs matter together (`row_feedback`).
- **Pivots as importance.** After feedback the cost of an error in column j is M_jj^2 = 1 / U_jj^2, not H_jj. The grid
  search is weighted by it.
- **Dead columns** (H_jj = 0) are rounded, not zeroed: the data seen later may excite them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from compress.quantization.columns import solve_columns
from compress.quantization.factor import Factor
from compress.quantization.gpu import judging
from compress.quantization.grid import Grid, dequantize, quantize
from compress.quantization.grid_search import minmax_grid, search_grid
from compress.quantization.k_quants import k_quant_grid
from compress.quantization.refine import Split, Swept, refined
from compress.quantization.row_feedback import Band, Rounded, below_each_other, rounded_with_feedback
from compress.quantization.scheme import Scheme

ScaleSearch = Literal["minmax", "mse", "weighted"]


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
    left_alone: bool = False
    """True where feedback along rows made it worse than rounding by its own inputs, and rows were solved each for
    itself."""


def solve(
    weights: list[Tensor],
    hessian: Tensor,
    factor: Factor | None,
    scheme: Scheme,
    stored: torch.dtype,
    scales: ScaleSearch = "weighted",
    split: Split | None = None,
    block: int = 64,
    outputs: list[list[Band]] | None = None,
) -> list[Solution]:
    """Codes for linears that read the same input, solved as one matrix stacked by rows.

    weights: (rows_i, columns) float32 each; hessian (columns, columns) float64; `stored` is the dtype scales are kept
    in. Never worse than rounding, in the H norm: where it is, the rounded codes are returned. With a `split`
    of the Hessian, codes and scales are refined with one part where the other says that it helps (`refine`).

    Rows are independent, unless `outputs` says how the outputs of each linear matter together: bands of its rows, by
    which what is left of a row's error goes on to later rows (`row_feedback`).
    """
    if factor is None:
        fallback: ScaleSearch = "mse" if scales == "weighted" else scales
        return [rounded(weight, hessian, scheme, stored, fallback) for weight in weights]
    rounding = _Rounding(factor, scheme, stored, scales, split, block)
    stacked = torch.cat(weights) if len(weights) > 1 else weights[0]
    sizes = [len(weight) for weight in weights]
    if outputs is None:
        found = rounding(stacked, sizes)
    else:
        found = rounded_with_feedback(stacked, below_each_other(outputs, sizes), rounding)
    solutions, start = [], 0
    for weight in weights:
        rows = slice(start, start + len(weight))
        refined_any = bool(found.refined[rows].any())
        grid = found.grid.rows(rows.start, rows.stop)
        solution = _judged(weight, found.codes[rows], grid, hessian, factor.damping, refined_any)
        if solution.kept_rounding and outputs is not None:
            alone = rounding(weight, [len(weight)])
            solution = _judged(weight, alone.codes, alone.grid, hessian, factor.damping, bool(alone.refined.any()))
            solution = replace(solution, left_alone=True)
        solutions.append(solution)
        start = rows.stop
    return solutions


class _Rounding:
    """Rounds rows of linears that read the same input: scales, columns, and refinements where they are judged."""

    def __init__(
        self,
        factor: Factor,
        scheme: Scheme,
        stored: torch.dtype,
        scales: ScaleSearch,
        split: Split | None,
        block: int,
    ) -> None:
        self.factor, self.scheme, self.stored, self.scales, self.block = factor, scheme, stored, scales, block
        self.split = split
        self.swept = None if split is None else Swept.of(_damped(split.fitted, factor.damping))

    def __call__(self, target: Tensor, sizes: Sequence[int]) -> Rounded:
        """`sizes`: rows of each matrix in `target` (rows, columns); a refinement is accepted for each or left out."""
        factor = self.factor
        grid = choose_grid(target, factor.pivots, self.scheme, self.stored, self.scales)
        codes = solve_columns(target, factor.order, factor.upper, grid, self.block)
        if self.split is None or self.swept is None:
            return Rounded(codes, grid, torch.zeros(len(target), dtype=torch.bool, device=target.device))
        other, refitted = refined(target, codes, grid, self.swept)
        before, after = (
            row_energies(dequantize(*each).float() - target, self.split.held_out)
            for each in ((codes, grid), (other, refitted))
        )
        pairs = zip(torch.split(before, list(sizes)), torch.split(after, list(sizes)), strict=True)
        better = [bool(new.sum() < old.sum()) for old, new in pairs]
        accepted = torch.tensor(better, device=target.device).repeat_interleave(
            torch.tensor(sizes, device=target.device)
        )
        if all(better):
            return Rounded(other, refitted, accepted)
        if not any(better):
            return Rounded(codes, grid, accepted)
        starts = [0, *accumulate(sizes)]
        parts = [
            (refitted if kept else grid).rows(start, stop)
            for kept, start, stop in zip(better, starts, starts[1:], strict=False)
        ]
        return Rounded(torch.where(accepted.unsqueeze(1), other, codes), Grid.cat(parts), accepted)


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
    return max(float(row_energies(rows, hessian).sum()), 0.0)


def row_energies(rows: Tensor, hessian: Tensor) -> Tensor:
    """a H a^T of each row a of A (rows, columns) float32: float64 (rows,)."""
    with judging(rows.device):
        product = rows @ hessian.float()
    return product.mul_(rows).sum(1, dtype=torch.float64)
