"""Running statistics of a linear's input: the Hessian H = (1/T) sum_t x_t x_t^T, accumulated over batches."""

from __future__ import annotations

import torch
from torch import Tensor

STRIP = 512
"""Rows of a strip: small enough to skip most of the lower triangle, large enough for a fast product."""
FLUSH_TOKENS = 16384
"""Tokens summed in float32 before they go into the float64 sum."""


class Hessian:
    """Accumulates x^T x: products and short sums in float32, the long sum in float64.

    H is symmetric and torch has no symmetric product, so the matrix is kept as strips of rows that begin at their
    diagonal: for 1536 columns two thirds of the work.
    """

    def __init__(self, columns: int, device: torch.device) -> None:
        self.columns, self.tokens, self._pending = columns, 0, 0
        starts = range(0, columns, STRIP)
        shapes = [(min(STRIP, columns - start), columns - start) for start in starts]
        self._short = [torch.zeros(shape, dtype=torch.float32, device=device) for shape in shapes]
        self._long = [torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes]

    def add(self, inputs: Tensor, mask: Tensor | None) -> None:
        """inputs (windows, tokens, columns); mask (windows, tokens), 1 where a token counts, or None."""
        rows = inputs.flatten(0, -2).float()
        if mask is not None:
            rows = rows[mask.flatten().bool().to(rows.device)]
        for number, strip in enumerate(self._short):
            start = number * STRIP
            strip.addmm_(rows[:, start : start + strip.shape[0]].T, rows[:, start:])
        self.tokens += rows.shape[0]
        self._pending += rows.shape[0]
        if self._pending >= FLUSH_TOKENS:
            self._flush()

    def _flush(self) -> None:
        for short, long in zip(self._short, self._long, strict=True):
            long += short
            short.zero_()
        self._pending = 0

    def mean(self) -> Tensor:
        """H (columns, columns) float64, whole."""
        self._flush()
        whole = torch.zeros(self.columns, self.columns, dtype=torch.float64, device=self._long[0].device)
        for number, strip in enumerate(self._long):
            start = number * STRIP
            whole[start : start + strip.shape[0], start:] = strip / max(1, self.tokens)
        upper = whole.triu()
        return upper + upper.triu(1).T
