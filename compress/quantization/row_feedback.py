"""Spread what is left of a row's error over the rows that come later, by how their outputs matter together.

GPTQ's columns minimise tr[E H E^T], E = W* - Q, which holds every row for itself. What the model's output loses is, to
second order and with inputs independent of gradients,

    1/2 tr[G E H E^T],     G = E_t[g_t g_t^T] (rows, rows), g the gradient of the loss with respect to the outputs

(`calibration.outputs`). Where G is far from diagonal, outputs can make up for each other: most of all those of a
query's or a key's head, of which only scalar products count. Minimising it is GPTQ on both sides, for the factor of a
Kronecker product is that of its parts: rows are taken `step` at a time by descending diag G, with U as in
`quantization.factor` but of G,

    T_b              the rows' targets when their turn comes
    Q_b, R_b         T_b rounded with feedback along columns; R_b = T_b - Q_b
    F_b = U_bb^-T R_b,    T_k -= U_bk^T F_b     for all rows k that come later

Scales are chosen for T_b, not for W*: they have to reach what is rounded. Rows of one step do not feel each other, so
shorter steps do better and take longer. All heads, and all matrices that read the same input, go through their steps
side by side.

**Judged before it is used.** A G from few tokens is noise in part, and rows that make up for noise do harm. With
rounding errors of one size and independent of each other, feedback by U costs

    sum_i (U G' U^T)_ii / U_ii^2      instead of      sum_i G'_ii

where G' is of tokens that U is not of. That chooses how much G is damped, and rows get no feedback where it does not
come to `WORTH`. In SmolLM2-135M it is 0.3 to 0.4 for heads of queries and keys, as what is then measured; about 0.9 for
what is added to the residual stream; and above 1 for values.

Sources: BoA (arXiv 2406.13474) rounds by what attention makes of queries and keys; YAQA (arXiv 2505.22988) with
Kronecker-factored Hessians on both sides; the factors are K-FAC's (arXiv 1503.05671).

Example, one column, two rows, step 1, scales 1, G = [[1, 0.5], [0.5, 1]], W* = [0.4, 0.35]: row 0 rounds to 0, R = 0.4;
row 1 aims at 0.35 + 0.5 x 0.4 = 0.55 and rounds to 1. E G E is 0.32 then, and 0.42 where both round to 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from compress.quantization.factor import Factor, factorise
from compress.quantization.grid import Grid, dequantize

STEPS, STEP = 24, 8
"""Steps that the rows which feel each other are rounded in, and how many rows a step has at least."""
DAMPINGS = (0.1, 0.3, 1.0, 3.0)
"""Fractions of mean(diag G) to add to its diagonal, of which other text chooses."""
WORTH = 0.95
"""Expected cost with feedback over that without, at most, for rows to get it."""


@dataclass(frozen=True)
class Rounded:
    """Rows on their grid. codes int8 (rows, columns); refined bool (rows,), where a refinement was accepted."""

    codes: Tensor
    grid: Grid
    refined: Tensor


Rounding = Callable[[Tensor, Sequence[int]], Rounded]
"""rounding(targets (rows, columns) float32, sizes): rows of one matrix after those of another, `sizes` of each."""


@dataclass(frozen=True)
class Band:
    """Rows of a matrix that feel each other, in the order of processing: numbers (n,) int64, U (n, n) float32.

    Without U they do not, and are rounded at once.
    """

    rows: Tensor
    upper: Tensor | None = None

    @classmethod
    def of(cls, factor: Factor, first: int) -> Band:
        """Of the factor of a G over rows `first` and following."""
        return cls(factor.order + first, factor.upper)

    def turn(self, start: int, step: int) -> slice:
        """Which of the rows are rounded when `start` rows of the longest band have been."""
        if self.upper is None:
            return slice(0, len(self.rows) if start == 0 else 0)
        return slice(start, min(start + step, len(self.rows)))


def bands_of(moments: Tensor) -> list[Band]:
    """Bands of a matrix whose rows are runs of one size, from G (2, runs, size, size) of each run over two halves of
    the text; rows of runs that feedback is not expected to help are a band without it."""
    bands, size = [], moments.shape[-1]
    alone: list[int] = []
    for number, (half, other) in enumerate(zip(*moments.double(), strict=True)):
        factor = _worthwhile(half, other)
        if factor is None:
            alone.append(number)
        else:
            bands.append(Band.of(factor, number * size))
    if alone:
        first = torch.tensor(alone, device=moments.device).unsqueeze(1) * size
        bands.append(Band((first + torch.arange(size, device=moments.device)).flatten()))
    return bands


def _worthwhile(half: Tensor, other: Tensor) -> Factor | None:
    """The factor of a run's G over all text, with the damping that a half of it asks for judged by the other; None
    where none of them is worth it."""
    tried = [(expected(factor, other), damping) for damping in DAMPINGS if (factor := factorise(half, damping))]
    cost, damping = min(tried, default=(math.inf, 0.0))
    return factorise((half + other) / 2, damping) if cost <= WORTH else None


def expected(factor: Factor, moments: Tensor) -> float:
    """Cost of errors spread by a factor over that of the same errors unspread, where G is `moments` (rows, rows)
    float64; infinite where that says nothing."""
    ordered = moments[factor.order][:, factor.order]
    upper = factor.upper.double()
    spread = float((((upper @ ordered) * upper).sum(1) / upper.diagonal().square()).sum())
    unspread = float(ordered.diagonal().sum())
    return spread / unspread if unspread > 0 and math.isfinite(spread) else math.inf


def below_each_other(bands: list[list[Band]], sizes: Sequence[int]) -> list[Band]:
    """Bands of matrices of so many rows each, as those of one matrix that has them one below the other."""
    starts = [0, *accumulate(sizes)]
    return [Band(band.rows + start, band.upper) for start, own in zip(starts, bands, strict=False) for band in own]


def rounded_with_feedback(target: Tensor, bands: list[Band], rounding: Rounding, step: int | None = None) -> Rounded:
    """Round every row of `target` (rows, columns) float32, with feedback along the rows of each of the `bands`.

    Bands have all rows between them, each once. `step`: rows of each band that are rounded together.
    """
    longest = max([1, *(len(band.rows) for band in bands if band.upper is not None)])
    step = step or max(STEP, math.ceil(longest / STEPS))
    work = target.clone()
    parts: list[Rounded] = []
    taken: list[Tensor] = []
    for start in range(0, longest, step):
        turns = [(band, turn) for band in bands if (turn := band.turn(start, step)).stop > turn.start]
        pieces = [band.rows[turn] for band, turn in turns]
        rows = torch.cat(pieces)
        sizes = [len(piece) for piece in pieces]
        found = rounding(work[rows], sizes)
        left = work[rows] - dequantize(found.codes, found.grid).float()
        for (band, turn), error in zip(turns, torch.split(left, sizes), strict=True):
            later = band.rows[turn.stop :]
            if len(later) and band.upper is not None:
                factor = torch.linalg.solve_triangular(band.upper[turn, turn].T, error, upper=False)
                work[later] -= band.upper[turn, turn.stop :].T @ factor
        parts.append(found)
        taken.append(rows)
    back = torch.argsort(torch.cat(taken))
    codes, refined = (torch.cat(each)[back] for each in ([p.codes for p in parts], [p.refined for p in parts]))
    return Rounded(codes, Grid.cat([part.grid for part in parts]).at(back), refined)
