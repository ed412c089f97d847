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

from compress.architecture import Architecture, Dimensions, architecture_of
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
    head_counts: tuple[int, ...]
    """Numbers of KV heads, ascending, that a config of this type can hold."""

    @classmethod
    def of(cls, config: Mapping[str, Any], dimensions: Dimensions, shapes: Mapping[str, Sequence[int]]) -> Model:
        """`config` is that of config.json, `shapes` those of every stored parameter, by full name."""
        architecture = architecture_of(dict(config))
        kinds = kinds_of(architecture, dimensions)
        prefix = architecture.block_name(0) + "."
        inside = {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}
        outside = sum(math.prod(shape) for name, shape in shapes.items() if architecture.block_index(name) is None)
        per_piece = {name: _per_piece(kind, inside, architecture.transposed_linears) for name, kind in kinds.items()}
        heads = tuple(n for n in range(1, dimensions.kv_heads + 1) if _holds_heads(config, dimensions, n))
        return cls(dimensions, kinds, outside, sum(map(math.prod, inside.values())), per_piece, heads)

    @property
    def counts(self) -> Counts:
        return Counts(self.dimensions.blocks, self.dimensions.kv_heads, self.dimensions.mlp_width)

    def block_parameters(self, counts: Counts) -> int:
        """Of all blocks together."""
        gone = {"heads": self.dimensions.kv_heads - counts.kv_heads, "mlp": self.dimensions.mlp_width - counts.channels}
        return counts.blocks * (self.block - sum(self.per_piece.get(name, 0) * count for name, count in gone.items()))

    def parameters(self, counts: Counts) -> int:
        return self.outside + self.block_parameters(counts)


def _holds_heads(config: Mapping[str, Any], dimensions: Dimensions, kv_heads: int) -> bool:
    """Whether transformers takes a config with so many KV heads: some types want heads to divide the hidden width."""
    from transformers import AutoConfig

    if kv_heads == dimensions.kv_heads:
        return True
    changed = {**config, **_heads_of(dimensions, kv_heads)}
    changed = {key: value for key, value in changed.items() if key not in ("quantization_config", "model_type")}
    try:
        AutoConfig.for_model(config["model_type"], **copy.deepcopy(changed))
    except Exception:
        return False
    return True


def _heads_of(dimensions: Dimensions, kv_heads: int) -> dict[str, int]:
    """Keys of the config that change with the number of KV heads."""
    return {
        "num_attention_heads": dimensions.heads // dimensions.kv_heads * kv_heads,
        "num_key_value_heads": kv_heads,
        "head_dim": dimensions.head_dim,
    }


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

    With several parts, blocks take half of what has to go (as ratios: the square root) and KV heads the share that
    their block gives, to the nearest possible number; the MLP takes the rest, or blocks where it is not among them. No
    less goes than asked for, and more by what one step of the last part is.
    Raises RecipeError naming the smallest model that the parts can give.
    """
    if target is None:
        return explicit
    wanted = _wanted(model, target, stored_bytes)
    allowed = wanted + (RATIO_WITHIN * model.block_parameters(model.counts) if target.ratio is not None else 0)
    ratio = wanted / model.block_parameters(explicit)
    if allowed >= model.block_parameters(explicit):
        return explicit
    _check_reachable(model, parts, explicit, multiple, allowed)
    counts = explicit
    if "depth" in parts and "mlp" in parts:
        counts = replace(counts, blocks=max(1, round(math.sqrt(ratio) * counts.blocks)))
    if "heads" in parts and len(parts) > 1:
        share = min(1.0, wanted / model.block_parameters(counts))
        near = (share if "mlp" in parts else math.sqrt(share)) * counts.kv_heads
        possible = [n for n in model.head_counts if n <= counts.kv_heads]
        counts = replace(counts, kv_heads=min(possible, key=lambda n: (abs(n - near), -n)))
    filled = _filled(model, counts, parts, allowed, multiple)
    while filled is None:
        # Even with the least of the last part too much is left: the others give one step more.
        counts = _one_step_less(model, counts, parts)
        filled = _filled(model, counts, parts, allowed, multiple)
    return filled


def _filled(model: Model, counts: Counts, parts: Sequence[Part], allowed: float, multiple: int) -> Counts | None:
    """The most of the last part that is allowed; None where not even the least of it is."""
    if "mlp" in parts:
        steps = range(counts.channels // multiple * multiple, 0, -multiple)
        tried = [replace(counts, channels=n) for n in (counts.channels, *steps)]
    elif "depth" in parts:
        tried = [replace(counts, blocks=n) for n in range(counts.blocks, 0, -1)]
    else:
        tried = [replace(counts, kv_heads=n) for n in reversed(model.head_counts) if n <= counts.kv_heads]
    return next((each for each in tried if model.block_parameters(each) <= allowed), None)


def _one_step_less(model: Model, counts: Counts, parts: Sequence[Part]) -> Counts:
    fewer = [n for n in model.head_counts if n < counts.kv_heads]
    if "depth" in parts and "mlp" in parts and counts.blocks > 1:
        return replace(counts, blocks=counts.blocks - 1)
    assert "heads" in parts and fewer, "the smallest counts were checked to be allowed"
    return replace(counts, kv_heads=fewer[-1])


def _check_reachable(model: Model, parts: Sequence[Part], explicit: Counts, multiple: int, allowed: float) -> None:
    smallest = Counts(
        1 if "depth" in parts else explicit.blocks,
        min(model.head_counts) if "heads" in parts else explicit.kv_heads,
        min(multiple, explicit.channels) if "mlp" in parts else explicit.channels,
    )
    least = model.block_parameters(smallest)
    if least <= allowed:
        return
    if allowed <= 0:
        raise RecipeError(
            f"target: what is outside the blocks (embeddings, head) alone takes {model.outside:,} parameters; let more "
            "stay"
        )
    ratio = 1 - least / model.block_parameters(model.counts)
    step = f", the MLP by multiples of {multiple}" if "mlp" in parts else ""
    raise RecipeError(
        f"target: {math.floor(allowed):,} parameters are left for the blocks, and taking from {', '.join(parts)}{step} "
        f"leaves at least {least:,} (a ratio of {ratio:.3f}). Take less, or from more parts"
    )


def _wanted(model: Model, target: Target, stored_bytes: int) -> int:
    """Parameters that the blocks should keep."""
    if target.ratio is not None:
        return math.floor((1 - target.ratio) * model.block_parameters(model.counts))
    whole = target.parameters if target.parameters is not None else (target.weight_bytes or 0) // stored_bytes
    return whole - model.outside


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
        changed |= _heads_of(dimensions, counts.kv_heads)
    return changed
