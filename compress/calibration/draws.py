"""Tokens drawn by a model's probabilities."""

from __future__ import annotations

import torch
from torch import Tensor


def tokens_drawn(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """A token (rows, 1) int64 for each row of probabilities (rows, vocabulary): where a number drawn evenly falls into
    the sums. `torch.multinomial` draws a number for every token of the vocabulary, on a CPU one after another. Of a row
    that is not finite any token may come."""
    sums = probabilities.cumsum(-1)
    drawn = torch.rand(len(sums), 1, generator=generator, device=sums.device) * sums[:, -1:]
    return torch.searchsorted(sums, drawn, right=True).clamp_max_(sums.shape[-1] - 1)
