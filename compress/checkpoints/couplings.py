"""Moving a factor per channel from one tensor to another without changing the function (`architecture.Coupling`).

A norm's weight times f and its readers' columns over f; an up projection's rows times f and the down projection's
columns over f; a value head's rows times f and, once for each query head that it serves, the output projection's
columns over f.

Example with one channel: norm weight 0.5, reader column 0.8, f = 1.25: 0.625 and 0.64, product 0.4 as before.
"""

from __future__ import annotations

from torch import Tensor

from compress.architecture import Coupling, Dimensions


def written(value: Tensor, coupling: Coupling, factors: Tensor, norm_offset: float) -> Tensor:
    """The writer's weight or bias, times factors (channels,). Norms multiply by `norm_offset` + weight."""
    if coupling.kind == "norm":
        return (value + norm_offset) * factors - norm_offset
    # A linear's rows, or its bias: either way the first dimension.
    return value * factors.view(-1, *[1] * (value.dim() - 1))


def to_columns(coupling: Coupling, factors: Tensor, dimensions: Dimensions) -> Tensor:
    """Factors (channels,) of the writer as the readers' columns see them, (columns,)."""
    if coupling.kind != "value_heads":
        return factors
    heads = factors.view(dimensions.kv_heads, -1)
    return heads.repeat_interleave(dimensions.heads // dimensions.kv_heads, dim=0).flatten()


def to_channels(coupling: Coupling, columns: Tensor, dimensions: Dimensions) -> Tensor:
    """The largest of what columns (columns,) have for each of the writer's channels: the other way round."""
    if coupling.kind != "value_heads":
        return columns
    served = dimensions.heads // dimensions.kv_heads
    return columns.view(dimensions.kv_heads, served, -1).amax(1).flatten()
