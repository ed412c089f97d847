"""Running statistics of a linear's input, summed over batches of tokens t with weights w_t (1 unless given):

    H = E[w x x^T]               every linear that reads x is solved with it
    D = E[w (x~ - x) x^T]        x~ the source model's input for the same token
    R = E[w (r~ - r) x^T]        r, r~ the residual streams, compressed and source's, that the output is added to

D and R tell how to move a linear's target (`quantization.target_shift`). They may cover fewer tokens than H, so H over
just their tokens is kept apart. Products and short sums are float32 (products of 16-bit values are exact there), the
long sum is float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.quantization.target_shift import Mismatch

STRIP = 192
"""Rows of a strip: small enough to skip most of the lower triangle, large enough for a fast product."""
FLUSH_TOKENS = 16384
"""Tokens summed in float32 before they go into the float64 sum."""


def token_rows(inputs: Tensor, mask: Tensor | None) -> Tensor:
    """(windows, tokens, columns) -> (kept tokens, columns) float32; mask (windows, tokens), 1 where a token counts."""
    rows = inputs.flatten(0, -2).float()
    return rows if mask is None else rows[mask.flatten().bool().to(rows.device)]


class _Strips:
    """Sum of left^T right over batches, (rows, columns), kept as strips of rows, strip i from column `starts[i]` on."""

    def __init__(self, rows: int, columns: int, upper_only: bool, device: torch.device) -> None:
        self.shape, self.tokens, self._pending = (rows, columns), 0, 0
        step = STRIP if upper_only else rows
        self.rows = list(range(0, rows, step))
        self.starts = self.rows if upper_only else [0] * len(self.rows)
        shapes = [(min(step, rows - row), columns - start) for row, start in zip(self.rows, self.starts, strict=True)]
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

    def sum(self) -> Tensor:
        """(rows, columns) float64; zero left of a strip's start."""
        self._flush()
        whole = torch.zeros(self.shape, dtype=torch.float64, device=self._long[0].device)
        for row, start, strip in zip(self.rows, self.starts, self._long, strict=True):
            whole[row : row + strip.shape[0], start:] = strip
        return whole


class InputStatistics:
    """All sums of one group's input.

    H is symmetric and torch has no symmetric product, so strips begin at their diagonal: for 1536 columns little more
    than half of the work.
    """

    def __init__(self, columns: int, device: torch.device) -> None:
        self.columns, self._device = columns, device
        self._alone = _Strips(columns, columns, upper_only=True, device=device)
        self._paired: _Strips | None = None
        self._cross: _Strips | None = None
        self._residual: _Strips | None = None
        self._held_out: _Strips | None = None

    @property
    def tokens(self) -> int:
        return self._alone.tokens + sum(part.tokens for part in (self._paired, self._held_out) if part)

    def hold_out(self, inputs: Tensor, mask: Tensor | None, weights: Tensor | None = None) -> None:
        """As `add`, for tokens whose H is also kept apart, to judge by what was not fitted."""
        if self._held_out is None:
            self._held_out = _Strips(self.columns, self.columns, upper_only=True, device=self._device)
        rows = token_rows(inputs, mask)
        self._held_out.add(_weighted(rows, mask, weights), rows)

    def add(self, inputs: Tensor, mask: Tensor | None, weights: Tensor | None = None) -> None:
        """inputs (windows, tokens, columns); mask (windows, tokens), 1 where a token counts, or None; weights the
        same shape, or None for 1."""
        rows = token_rows(inputs, mask)
        self._alone.add(_weighted(rows, mask, weights), rows)

    def add_pair(
        self,
        inputs: Tensor,
        reference: Tensor,
        mask: Tensor | None,
        residual: tuple[Tensor, Tensor] | None = None,
        weights: Tensor | None = None,
    ) -> None:
        """inputs and the source's for the same tokens (windows, tokens, columns); `residual`: the residual stream and
        the source's (windows, tokens, hidden)."""
        rows = token_rows(inputs, mask)
        if self._paired is None:
            self._paired = _Strips(self.columns, self.columns, upper_only=True, device=self._device)
            self._cross = _Strips(self.columns, self.columns, upper_only=False, device=self._device)
        assert self._cross is not None
        weighted = _weighted(rows, mask, weights)
        self._paired.add(weighted, rows)
        self._cross.add(token_rows(reference, mask) - rows, weighted)
        if residual is not None:
            here, there = residual
            error = token_rows(there, mask) - token_rows(here, mask)
            if self._residual is None:
                self._residual = _Strips(error.shape[1], self.columns, upper_only=False, device=self._device)
            self._residual.add(error, weighted)

    def hessian(self) -> Tensor:
        """H (columns, columns) float64 over all tokens."""
        upper = self._alone.sum()
        for part in (self._paired, self._held_out):
            if part is not None:
                upper += part.sum()
        return _mirrored(upper.div_(max(1, self.tokens)))

    def split(self) -> tuple[Tensor, Tensor] | None:
        """H over the tokens not held out, and over those held out; None if either has none."""
        if self._held_out is None or self.tokens == self._held_out.tokens:
            return None
        held, rest = self._held_out.sum(), self._alone.sum()
        if self._paired is not None:
            rest += self._paired.sum()
        count = self._held_out.tokens
        return _mirrored(rest.div_(self.tokens - count)), _mirrored(held.div_(count))

    def mismatch(self) -> Mismatch | None:
        """D, R and their own H, or None if no source stream ran beside."""
        if self._paired is None or self._cross is None:
            return None
        count = max(1, self._paired.tokens)
        return Mismatch(
            _mirrored(self._paired.sum().div_(count)),
            self._cross.sum().div_(count),
            None if self._residual is None else self._residual.sum().div_(count),
            count,
        )


def _weighted(rows: Tensor, mask: Tensor | None, weights: Tensor | None) -> Tensor:
    return rows if weights is None else rows * token_rows(weights.unsqueeze(-1), mask).to(rows.device)


def _mirrored(upper: Tensor) -> Tensor:
    """A symmetric matrix from its upper triangle."""
    upper.triu_()
    return upper + upper.triu(1).T
