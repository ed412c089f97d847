"""Running statistics of a linear's input, accumulated over batches: H = E[x x^T], and D = E[(x~ - x) x^T] against the
source model's input x~ for the same tokens.

Products and short sums are float32 (products of 16-bit values are exact there), the long sum is float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

STRIP = 512
"""Rows of a strip: small enough to skip most of the lower triangle, large enough for a fast product."""
FLUSH_TOKENS = 16384
"""Tokens summed in float32 before they go into the float64 sum."""


def token_rows(inputs: Tensor, mask: Tensor | None) -> Tensor:
    """(windows, tokens, columns) -> (kept tokens, columns) float32; mask (windows, tokens), 1 where a token counts."""
    rows = inputs.flatten(0, -2).float()
    return rows if mask is None else rows[mask.flatten().bool().to(rows.device)]


class _Strips:
    """Sum of left^T right over batches, kept as strips of rows; strip i holds columns from `starts[i]` on."""

    def __init__(self, columns: int, upper_only: bool, device: torch.device) -> None:
        self.columns, self.tokens, self._pending = columns, 0, 0
        self.rows = list(range(0, columns, STRIP))
        self.starts = self.rows if upper_only else [0] * len(self.rows)
        shapes = [
            (min(STRIP, columns - row), columns - start) for row, start in zip(self.rows, self.starts, strict=True)
        ]
        self._short = [torch.zeros(shape, dtype=torch.float32, device=device) for shape in shapes]
        self._long = [torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes]

    def add(self, left: Tensor, right: Tensor) -> None:
        for row, start, strip in zip(self.rows, self.starts, self._short, strict=True):
            strip.addmm_(left[:, row : row + strip.shape[0]].T, right[:, start:])
        self.tokens += right.shape[0]
        self._pending += right.shape[0]
        if self._pending >= FLUSH_TOKENS:
            self._flush()

    def _flush(self) -> None:
        for short, long in zip(self._short, self._long, strict=True):
            long += short
            short.zero_()
        self._pending = 0

    def mean(self) -> Tensor:
        """(columns, columns) float64; zero left of a strip's start."""
        self._flush()
        whole = torch.zeros(self.columns, self.columns, dtype=torch.float64, device=self._long[0].device)
        for row, start, strip in zip(self.rows, self.starts, self._long, strict=True):
            whole[row : row + strip.shape[0], start:] = strip / max(1, self.tokens)
        return whole


class Hessian:
    """H = (1/T) sum_t x_t x_t^T.

    H is symmetric and torch has no symmetric product, so strips begin at their diagonal: for 1536 columns two thirds
    of the work.
    """

    def __init__(self, columns: int, device: torch.device) -> None:
        self._strips = _Strips(columns, upper_only=True, device=device)

    @property
    def tokens(self) -> int:
        return self._strips.tokens

    def add(self, inputs: Tensor, mask: Tensor | None) -> None:
        """inputs (windows, tokens, columns); mask (windows, tokens), 1 where a token counts, or None."""
        rows = token_rows(inputs, mask)
        self._strips.add(rows, rows)

    def mean(self) -> Tensor:
        """H (columns, columns) float64, whole."""
        upper = self._strips.mean().triu_()
        return upper + upper.triu(1).T


class CrossMoment:
    """D = (1/T) sum_t (x~_t - x_t) x_t^T, x~ the source model's input for the same token."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self._strips = _Strips(columns, upper_only=False, device=device)

    def add(self, inputs: Tensor, reference: Tensor, mask: Tensor | None) -> None:
        """inputs and reference (windows, tokens, columns)."""
        rows = token_rows(inputs, mask)
        self._strips.add(token_rows(reference, mask) - rows, rows)

    def mean(self) -> Tensor:
        """D (columns, columns) float64."""
        return self._strips.mean()
