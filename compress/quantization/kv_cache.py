"""Keys and values kept in 8 bits: what a cache gives back, and what is seen while scales are calibrated.

A runtime stores a key or value x as q = fp8(x / s), e4m3 with values up to 448, and reads back q s. One scale a layer,
or one a head, is fixed beforehand: s = max|x| / 448 over calibration tokens. Keys are those after rotation, as caches
keep them. `RoundedCache` and `SeenCache` stand where transformers' attention expects a cache, so no architecture is
re-implemented.

Example: values up to 3.5 give s = 0.0078125; 0.1 / s = 12.8 is stored as 13 (e4m3 has steps of 1 there), read 0.1016.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LARGEST = 448.0
"""Of torch.float8_e4m3fn."""


def rounded(states: Tensor, scale: Tensor) -> Tensor:
    """Keys or values (windows, heads, tokens, head_dim) as a cache gives them back; scale (1,) or (heads, 1, 1)."""
    with torch.no_grad():
        scaled = (states.float() / scale).clamp_(-LARGEST, LARGEST)
        values = (scaled.to(torch.float8_e4m3fn).float() * scale).to(states.dtype)
    # Gradients pass as if nothing were rounded: 8 bits are too few for them.
    return states + (values - states).detach() if states.requires_grad else values


def scale_of(largest: Tensor, per_head: bool, stored: torch.dtype) -> Tensor:
    """Scale (1,) or (heads, 1, 1) in the stored dtype, for the largest magnitude of each head (heads,)."""
    chosen = largest.view(-1, 1, 1) if per_head else largest.amax().view(1)
    # Rounded up to the stored dtype, or the largest value would be clipped.
    scale = (chosen / LARGEST * (1 + torch.finfo(stored).eps)).to(stored)
    return scale.clamp_min(torch.finfo(stored).tiny)


class RoundedCache:
    """A cache without a past, that rounds what it is given."""

    def __init__(self, key_scale: Tensor, value_scale: Tensor) -> None:
        self.scales = key_scale.float(), value_scale.float()

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return rounded(keys, self.scales[0]), rounded(values, self.scales[1])


class SeenCache:
    """A cache without a past, that remembers the largest magnitude of each head (heads,), padding included."""

    def __init__(self) -> None:
        self.largest: tuple[Tensor, Tensor] | None = None

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        found = tuple(states.detach().float().abs().amax((0, 2, 3)) for states in (keys, values))
        before = self.largest or found
        self.largest = torch.maximum(before[0], found[0]), torch.maximum(before[1], found[1])
        return keys, values
