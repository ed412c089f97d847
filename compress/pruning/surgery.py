"""Slicing the tensors of a block, and laying sliced tensors back into a block of the old size.

Both directions are exact: in a block of the old size, a piece whose columns of the reader are zero adds nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.architecture import Architecture, Dimensions, Removable, Rows
from compress.pruning.choose import columns_of


@dataclass(frozen=True)
class Kind:
    """A kind of piece in a model: how many a block has, and how many rows of each run one is."""

    removable: Removable
    pieces: int
    widths: Mapping[Rows, int]
    width: int
    """Columns of the reader that a piece is."""


def kinds_of(architecture: Architecture, dimensions: Dimensions) -> dict[str, Kind]:
    """By the name that recipes use: `mlp` and `heads`, where the architecture has them."""
    found = {}
    if architecture.mlp_channels:
        found["mlp"] = Kind(architecture.mlp_channels, dimensions.mlp_width, {"channels": 1}, 1)
    if architecture.kv_heads:
        served = dimensions.heads // dimensions.kv_heads * dimensions.head_dim
        widths: dict[Rows, int] = {"query_heads": served, "kv_heads": dimensions.head_dim}
        found["heads"] = Kind(architecture.kv_heads, dimensions.kv_heads, widths, served)
    return found


@dataclass(frozen=True)
class Cut:
    """Pieces of one kind that stay in a block: their numbers, ascending."""

    kind: Kind
    kept: Tensor

    def of(self, leaf: str, parameter: str) -> tuple[Tensor, bool] | None:
        """The rows (True) or columns (False) of a tensor that stay; None where the cut does not touch it.

        `leaf` is the linear's name inside the block, `parameter` weight or bias.
        """
        if leaf == self.kind.removable.reader and parameter == "weight":
            return columns_of(self.kept, self.kind.width), False
        runs = dict(self.kind.removable.writers).get(leaf)
        if runs is None:
            return None
        start, rows = 0, []
        for run in runs:
            width = self.kind.widths[run]
            rows.append(start + columns_of(self.kept, width))
            start += self.kind.pieces * width
        return torch.cat(rows), True


def sliced(tensor: Tensor, name: str, cuts: list[Cut], transposed: bool) -> Tensor:
    """What stays of a block's tensor; `name` inside the block, such as mlp.up_proj.weight."""
    leaf, _, parameter = name.rpartition(".")
    for cut in cuts:
        found = cut.of(leaf, parameter)
        if found is not None:
            indices, is_row = found
            tensor = tensor.index_select(_axis(tensor, is_row, transposed), indices.to(tensor.device))
    return tensor.contiguous()


def laid_back(part: Tensor, name: str, cuts: list[Cut], transposed: bool, shape: torch.Size) -> Tensor:
    """A tensor of the old `shape` with a sliced one in its old place, zero elsewhere."""
    leaf, _, parameter = name.rpartition(".")
    for cut in cuts:
        found = cut.of(leaf, parameter)
        if found is not None:
            indices, is_row = found
            axis = _axis(part, is_row, transposed)
            size = [*part.shape]
            size[axis] = shape[axis]
            whole = part.new_zeros(size)
            part = whole.index_copy_(axis, indices.to(part.device), part)
    return part


def _axis(tensor: Tensor, is_row: bool, transposed: bool) -> int:
    return 0 if tensor.dim() == 1 or is_row is not transposed else 1


def written_norms(state: Mapping[str, Tensor], kind: Kind, transposed: bool) -> Tensor:
    """Norms (pieces,) of the rows that put each piece out, summed over the linears; state: tensors of the block."""
    total = torch.zeros(kind.pieces)
    for leaf, runs in kind.removable.writers:
        weight = state[f"{leaf}.weight"].float()
        weight = weight.T if transposed else weight
        start = 0
        for run in runs:
            rows = kind.pieces * kind.widths[run]
            total = total.to(weight.device) + weight[start : start + rows].reshape(kind.pieces, -1).norm(dim=1)
            start += rows
    return total
