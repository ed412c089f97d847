"""Running statistics of a linear's input: the Hessian H = (1/T) sum_t x_t x_t^T, accumulated over batches."""

from __future__ import annotations

import torch
from torch import Tensor


class Hessian:
    """Accumulates x^T x in float64 from float32 products (bf16 products are exact in float32)."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self.sum = torch.zeros(columns, columns, dtype=torch.float64, device=device)
        self.tokens = 0

    def add(self, inputs: Tensor, mask: Tensor | None) -> None:
        """inputs (windows, tokens, columns); mask (windows, tokens), 1 where a token counts, or None."""
        rows = inputs.flatten(0, -2).float()
        if mask is not None:
            rows = rows[mask.flatten().bool().to(rows.device)]
        self.sum += rows.T @ rows
        self.tokens += rows.shape[0]

    def mean(self) -> Tensor:
        """H (columns, columns) float64."""
        return self.sum / max(1, self.tokens)
