"""How many blocks, KV heads and MLP channels a target leaves, and the config of a model that has so many.

All blocks stay alike, so the parameters of a model are linear in the counts:

    outside + blocks (fixed + kv_heads a + channels c)

Example: SmolLM2-135M has blocks of 3,540,096 parameters, of which 1,728 go with each of 1,536 channels: a target of
12.5 % fewer block parameters from channels alone leaves 1,280, which is 12.496 %.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from compress.architecture import Architecture, Dimensions
from compress.errors import RecipeError
from compress.pruning.surgery import Kind, kinds_of

Part = Literal["depth", "mlp", "heads"]
RATIO_WITHIN = 0.005
"""Norms and biases do not go, so that a round ratio is missed by a hair; bytes and parameters are limits."""
SERVED_BY = 128
"""What kernels and tensor parallelism want the MLP's width to be a multiple of, in models wide enough."""


class Target(BaseModel):
    """How small the model should become. Exactly one field."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    ratio: float | None = Field(
        default=None, gt=0, lt=1, description="share of the blocks' parameters that goes, met within half a percent"
    )
    parameters: int | None = Field(default=None, ge=1, description="parameters that the whole model keeps at most")
    weight_bytes: int | None = Field(
        default=None, ge=1, description="bytes that the whole model keeps at most, in its 16-bit dtype"
    )

    @model_validator(mode="after")
    def _one(self) -> Target:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"give exactly one of ratio, parameters, weight_bytes (given: {', '.join(given) or 'none'})"
            )
        return self


@dataclass(frozen=True)
class Counts:
    """What a model has of each: blocks, KV heads in each, channels of the MLP in each."""

    blocks: int
    kv_heads: int
    channels: int


@dataclass(frozen=True)
class Model:
    """The sizes of a model from which counts follow."""

    dimensions: Dimensions
    kinds: Mapping[str, Kind]
    outside: int
    """Parameters outside the blocks."""
    block: int
    """Parameters of one block as it is."""
    per_piece: Mapping[str, int]
    """Parameters that go with one piece of a kind."""

    @classmethod
    def of(cls, architecture: Architecture, dimensions: Dimensions, shapes: Mapping[str, Sequence[int]]) -> Model:
        """`shapes` of every stored parameter, by full name."""
        kinds = kinds_of(architecture, dimensions)
        prefix = architecture.block_name(0) + "."
        inside = {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}
        outside = sum(math.prod(shape) for name, shape in shapes.items() if architecture.block_index(name) is None)
        per_piece = {name: _per_piece(kind, inside, architecture.transposed_linears) for name, kind in kinds.items()}
        return cls(dimensions, kinds, outside, sum(map(math.prod, inside.values())), per_piece)

    @property
    def counts(self) -> Counts:
        return Counts(self.dimensions.blocks, self.dimensions.kv_heads, self.dimensions.mlp_width)

    def block_parameters(self, counts: Counts) -> int:
        """Of all blocks together."""
        gone = {"heads": self.dimensions.kv_heads - counts.kv_heads, "mlp": self.dimensions.mlp_width - counts.channels}
        return counts.blocks * (self.block - sum(self.per_piece.get(name, 0) * count for name, count in gone.items()))

    def parameters(self, counts: Counts) -> int:
        return self.outside + self.block_parameters(counts)


def _per_piece(kind: Kind, inside: Mapping[str, Sequence[int]], transposed: bool) -> int:
    reader = inside[f"{kind.removable.reader}.weight"]
    total = kind.width * (reader[1] if transposed else reader[0])
    for leaf, runs in kind.removable.writers:
        weight = inside[f"{leaf}.weight"]
        each = (weight[0] if transposed else weight[1]) + (f"{leaf}.bias" in inside)
        total += sum(kind.widths[run] for run in runs) * each
    return total


def multiple_for(width: int, asked: int | None) -> int:
    """What the MLP's width is rounded down to a multiple of: asked for, or a power of two up to 128 that leaves at
    least eight steps."""
    return asked or max(1, min(SERVED_BY, 1 << max(0, (width // 8).bit_length() - 1)))


def counts_for(
    model: Model, target: Target | None, parts: Sequence[Part], explicit: Counts, multiple: int, stored_bytes: int
) -> Counts:
    """Counts that meet a target by taking from `parts` what `explicit` leaves; without one, `explicit` itself.

    Blocks, where they are among several parts, take half of what has to go (as ratios: the square root), KV heads the
    share that all of the block gives, each rounded so as not to take more; the last of heads and MLP takes the rest.
    Raises RecipeError naming the smallest model that the parts can give.
    """
    if target is None:
        return explicit
    allowed = _allowed(model, target, stored_bytes)
    ratio = allowed / model.block_parameters(explicit)
    if ratio >= 1:
        return explicit
    smallest = Counts(
        1 if "depth" in parts else explicit.blocks,
        1 if "heads" in parts else explicit.kv_heads,
        min(multiple, explicit.channels) if "mlp" in parts else explicit.channels,
    )
    if model.block_parameters(smallest) > allowed:
        total = model.block_parameters(model.counts)
        raise RecipeError(
            f"target: {allowed:,} parameters are left for the blocks, and taking from {', '.join(parts)} leaves at "
            f"least {model.block_parameters(smallest):,} (a ratio of "
            f"{1 - model.block_parameters(smallest) / total:.3f}). "
            "Take less, or from more parts"
        )
    counts = explicit
    if "depth" in parts:
        share = ratio if len(parts) == 1 else math.sqrt(ratio)
        fits = math.floor if len(parts) == 1 else math.ceil
        counts = replace(counts, blocks=max(1, fits(share * counts.blocks + (-1e-9 if fits is math.ceil else 1e-9))))
    if "heads" in parts:
        counts = replace(counts, kv_heads=_heads(model, counts, allowed, is_last="mlp" not in parts))
    if "mlp" in parts:
        counts = replace(counts, channels=_channels(model, counts, allowed, multiple))
    if model.block_parameters(counts) > allowed:
        # Rounding left too much: a coarser part gives one more step until the target is met.
        counts = _shrunk(model, counts, parts, allowed, multiple)
    return counts


def _allowed(model: Model, target: Target, stored_bytes: int) -> int:
    """Parameters that the blocks may keep."""
    if target.ratio is not None:
        return math.floor((1 - target.ratio + RATIO_WITHIN) * model.block_parameters(model.counts))
    whole = target.parameters if target.parameters is not None else (target.weight_bytes or 0) // stored_bytes
    return whole - model.outside


def _heads(model: Model, counts: Counts, allowed: int, is_last: bool) -> int:
    ratio = min(1.0, allowed / model.block_parameters(counts))
    if not is_last:
        return max(1, math.ceil(ratio * counts.kv_heads - 1e-9))
    fitting = [
        n for n in range(1, counts.kv_heads + 1) if model.block_parameters(replace(counts, kv_heads=n)) <= allowed
    ]
    return max(fitting, default=1)


def _channels(model: Model, counts: Counts, allowed: int, multiple: int) -> int:
    steps = [counts.channels, *range(counts.channels // multiple * multiple, 0, -multiple)]
    fitting = (n for n in steps if model.block_parameters(replace(counts, channels=n)) <= allowed)
    return next(fitting, min(multiple, counts.channels))


def _shrunk(model: Model, counts: Counts, parts: Sequence[Part], allowed: int, multiple: int) -> Counts:
    while model.block_parameters(counts) > allowed:
        if "heads" in parts and counts.kv_heads > 1:
            counts = replace(counts, kv_heads=counts.kv_heads - 1)
        elif "depth" in parts and counts.blocks > 1:
            counts = replace(counts, blocks=counts.blocks - 1)
        else:
            break
        if "mlp" in parts:
            counts = replace(
                counts,
                channels=_channels(model, replace(counts, channels=model.dimensions.mlp_width), allowed, multiple),
            )
    return counts


PER_BLOCK = ("layer_types", "no_rope_layers")
"""Keys of configs with one entry a block."""


def pruned_config(
    config: Mapping[str, Any],
    resolved: Any,
    architecture: Architecture,
    dimensions: Dimensions,
    counts: Counts,
    blocks: Sequence[int],
) -> dict[str, Any]:
    """config.json of the result; `resolved` is transformers' config object, which knows lists that the file leaves out,
    `blocks` the numbers of those that stay."""
    changed = copy.deepcopy(dict(config))
    if counts.blocks != dimensions.blocks:
        changed[architecture.blocks_field] = counts.blocks
        for key in PER_BLOCK:
            entries = getattr(resolved, key, None)
            if entries:
                changed[key] = [entries[index] for index in blocks]
        if "max_window_layers" in changed:
            changed["max_window_layers"] = sum(index < changed["max_window_layers"] for index in blocks)
    if counts.channels != dimensions.mlp_width:
        changed[architecture.width_field] = counts.channels
    if counts.kv_heads != dimensions.kv_heads:
        changed["num_attention_heads"] = dimensions.heads // dimensions.kv_heads * counts.kv_heads
        changed["num_key_value_heads"] = counts.kv_heads
        changed["head_dim"] = dimensions.head_dim
    return changed
