"""Running statistics of a linear's input, summed over batches of tokens t with weights w_t (1 unless given):

    H = E[w x x^T]               every linear that reads x is solved with it
    D = E[w (x~ - x) x^T]        x~ the source model's input for the same token
    R = E[w (r~ - r) x^T]        r, r~ the residual streams, compressed and source's, that the output is added to

D and R tell how to move a linear's target (`quantization.target_shift`). They may cover fewer tokens than H, so H over
just their tokens is kept apart. The product of one batch is float32, sums over batches are float64: adding float32
numbers there rounds only where they lie more than 2^29 apart, so it hardly ever matters in which order batches come,
or which of several processes (`compress.parallel`) sees which batch.

Inputs that a GPU computed in 16 bits are multiplied in 16 bits, some ten times as fast: the product of two such numbers
is exact in float32, which is what the tensor cores sum in. Differences x~ - x and weighted inputs are rounded to 16
bits first, an error of at most 2^-8 of each number (bfloat16) that has no direction.

On a CPU whose linears multiply in bfloat16 all three are sums over rows of 8-bit integers (`integer_rows`), a quarter
of the time of a float32 product, where the processor multiplies integers exactly; elsewhere float32. Not bfloat16,
which rounds the sum over a batch: of 120 H of SmolLM2-135M six were indefinite then at a damping of 0.01.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from compress import parallel
from compress.calibration import integer_rows
from compress.calibration.integer_rows import IntegerRows
from compress.quantization.refine import Split
from compress.quantization.target_shift import Mismatch

STRIP = 192
"""Rows of a product that go into the sum at a time: small enough to skip most of the lower triangle, large enough for
a fast product."""
GPU_STRIP = 2048
"""The same on a GPU, which needs larger products to be fast."""
_HALF = (torch.bfloat16, torch.float16)


def token_rows(inputs: Tensor, mask: Tensor | None) -> Tensor:
    """(windows, tokens, columns) -> (kept tokens, columns), float32, or as they are where a GPU has 16-bit ones.

    mask (windows, tokens), 1 where a token counts.
    """
    rows = inputs.flatten(0, -2)
    if not (rows.is_cuda and rows.dtype in _HALF):
        rows = rows.float()
    return rows if mask is None else rows[mask.flatten().bool().to(rows.device)]


Rows = Tensor | IntegerRows
"""(tokens, columns)."""


def product(left: Rows, right: Rows, rows: slice = slice(None), columns: slice = slice(None)) -> Tensor:
    """left^T right float32 (left's columns, right's columns) of one kind; of the product just `rows` and `columns`."""
    if isinstance(left, IntegerRows):
        assert isinstance(right, IntegerRows)
        return integer_rows.product(left.columns(rows), right.columns(columns))
    assert isinstance(right, Tensor)
    if left.is_cuda and left.dtype in _HALF:
        return torch.mm(left[:, rows].T, right[:, columns], out_dtype=torch.float32)
    return left[:, rows].T @ right[:, columns]


def summed_as(products: torch.dtype, device: torch.device) -> torch.dtype:
    """What rows are rounded to before their products, where linears multiply in `products`."""
    if device.type != "cpu":
        return products
    return torch.int8 if products is torch.bfloat16 and integer_rows.exact_here() else torch.float32


def facts_of_products(products: torch.dtype, device: torch.device) -> dict[str, str]:
    """What a stage says of it: `auto`, and processors whose integer products are not exact, decide at run time."""
    named = {"products": products, "inputs_summed_as": summed_as(products, device)}
    return {name: str(dtype).removeprefix("torch.") for name, dtype in named.items()}


class Sum:
    """Sum of left^T right over batches, float64 (rows, columns), and the number of tokens in it.

    With `upper_only` nothing left of a strip's diagonal is computed; it stays zero.
    """

    def __init__(self, rows: int, columns: int, device: torch.device, upper_only: bool) -> None:
        self.whole = torch.zeros(rows, columns, dtype=torch.float64, device=device)
        self.tokens, self.upper_only = 0, upper_only

    def add(self, left: Rows, right: Rows) -> None:
        """left (tokens, rows), right (tokens, columns), as `token_rows` gives them."""
        strip = GPU_STRIP if self.whole.is_cuda else STRIP
        # Integers become float32, scaled, then float64: that is best done where it fits a cache.
        step = strip if self.upper_only or isinstance(left, IntegerRows) else 4 * strip
        for row in range(0, len(self.whole), step):
            start = row if self.upper_only else 0
            self.whole[row : row + step, start:] += product(left, right, slice(row, row + step), slice(start, None))
        self.tokens += len(right)


class InputStatistics:
    """All sums of one group's input.

    H is symmetric and torch has no symmetric product, so strips begin at their diagonal: for 1536 columns little more
    than half of the work. A sum that nothing was added to takes no memory.
    """

    def __init__(self, columns: int, device: torch.device, products: torch.dtype = torch.float32) -> None:
        """`products`: what linears multiply in, which `summed_as` goes by."""
        self.columns, self._device = columns, device
        self._integers = summed_as(products, device) is torch.int8
        self._alone: Sum | None = None
        self._paired: Sum | None = None
        self._cross: Sum | None = None
        self._residual: Sum | None = None
        self._held_out: Sum | None = None

    @property
    def tokens(self) -> int:
        return sum(each.tokens for each in (self._alone, self._paired, self._held_out) if each is not None)

    def hold_out(self, inputs: Tensor, mask: Tensor | None, weights: Tensor | None = None) -> None:
        """As `add`, for tokens whose H is also kept apart, to judge by what was not fitted."""
        self._held_out = self._held_out or self._empty(self.columns, upper_only=True)
        self._held_out.add(*self._factors(token_rows(inputs, mask), mask, weights))

    def add(self, inputs: Tensor, mask: Tensor | None, weights: Tensor | None = None) -> None:
        """inputs (windows, tokens, columns); mask (windows, tokens), 1 where a token counts, or None; weights the
        same shape, none of them negative, or None for 1."""
        self._alone = self._alone or self._empty(self.columns, upper_only=True)
        self._alone.add(*self._factors(token_rows(inputs, mask), mask, weights))

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
        errors = [token_rows(reference, mask) - rows]
        if residual is not None:
            here, there = residual
            errors.append(token_rows(there, mask) - token_rows(here, mask))
        weighted, as_are, *beside = self._factors(rows, mask, weights, errors)
        self._paired = self._paired or self._empty(self.columns, upper_only=True)
        self._paired.add(weighted, as_are)
        self._cross = self._cross or self._empty(self.columns)
        self._cross.add(beside[0], weighted)
        if residual is not None:
            self._residual = self._residual or self._empty(errors[1].shape[1])
            self._residual.add(beside[1], weighted)

    def _factors(
        self, rows: Tensor, mask: Tensor | None, weights: Tensor | None, errors: Sequence[Tensor] = ()
    ) -> list[Rows]:
        """Weighted rows, rows, and each of `errors`: the first one's product with any of the others is a weighted sum.

        As integers all of them have the root of the weights, so that H is a sum of squares."""
        if not self._integers:
            weighted = rows if weights is None else (rows * _per_token(weights, mask, rows)).to(rows.dtype)
            return [weighted, rows, *(each.to(rows.dtype) for each in errors)]
        batches = [rows, *errors]
        if weights is not None:
            roots = _per_token(weights, mask, rows).sqrt()
            batches = [each * roots for each in batches]
        first, *rest = integer_rows.rounded(*batches)
        return [first, first, *rest]

    def _empty(self, rows: int, upper_only: bool = False) -> Sum:
        return Sum(rows, self.columns, self._device, upper_only)

    def reduce(self) -> None:
        """Make every sum that of all processes' batches. All call this together; with one process it does nothing.

        The leader has the first batch, so it has every kind of sum that anybody has; others may lack some.
        """
        if parallel.count() == 1:
            return
        leaders = None if self._residual is None else len(self._residual.whole)
        pairs, hidden = parallel.from_leader((self._paired is not None, leaders))
        self._alone = self._alone or self._empty(self.columns, upper_only=True)
        if parallel.total(0 if self._held_out is None else 1):
            self._held_out = self._held_out or self._empty(self.columns, upper_only=True)
        if pairs:
            self._paired = self._paired or self._empty(self.columns, upper_only=True)
            self._cross = self._cross or self._empty(self.columns)
        if hidden is not None:
            self._residual = self._residual or self._empty(hidden)
        for each in (self._alone, self._held_out, self._paired, self._cross, self._residual):
            if each is not None:
                parallel.add_up(each.whole)
                each.tokens = parallel.total(each.tokens)

    def mismatch(self) -> Mismatch | None:
        """D, R and their own H, or None if no source stream ran beside. Hands over the memory of these sums."""
        paired, cross, residual = self._paired, self._cross, self._residual
        if paired is None or cross is None:
            return None
        self._paired = self._cross = self._residual = None
        if self._alone is None:
            self._alone = self._empty(self.columns, upper_only=True)
        self._alone.whole += paired.whole
        self._alone.tokens += paired.tokens
        count = max(1, paired.tokens)
        return Mismatch(
            mirrored(paired.whole.div_(count)),
            cross.whole.div_(count),
            None if residual is None else residual.whole.div_(count),
            count,
        )

    def hessian(self) -> tuple[Tensor, Split | None]:
        """H (columns, columns) float64 over all tokens, and over those held out and the rest where there are both.

        Uses the sums up: called once, after `mismatch`.
        """
        assert self._paired is None, "mismatch() has the sums of the pairs and comes first"
        alone, held_out = self._alone or self._empty(self.columns, upper_only=True), self._held_out
        self._alone = self._held_out = None
        split = None
        if held_out is not None:
            if alone.tokens and held_out.tokens:
                split = Split(*(mirrored((each.whole / each.tokens).float()) for each in (alone, held_out)))
            alone.whole += held_out.whole
            alone.tokens += held_out.tokens
        return mirrored(alone.whole.div_(max(1, alone.tokens))), split


def _per_token(weights: Tensor, mask: Tensor | None, rows: Tensor) -> Tensor:
    """(kept tokens, 1), where `rows` are."""
    return token_rows(weights.unsqueeze(-1), mask).to(rows.device)


def mirrored(upper: Tensor) -> Tensor:
    """A symmetric matrix from its upper triangle, in the same memory."""
    for row in range(0, len(upper), STRIP):
        stop = min(row + STRIP, len(upper))
        corner = upper[row:stop, row:stop]
        corner.copy_(corner.triu() + corner.triu(1).T)
        upper[stop:, row:stop] = upper[row:stop, stop:].T
    return upper
