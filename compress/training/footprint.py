"""The memory training will take, and what that says about how to train."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch

from compress.checkpoints.skeleton import Skeleton
from compress.memory import predict
from compress.memory.measure import free_bytes
from compress.quantization.scheme import Scheme
from compress.training.trained import Trainable, What

Mode = Literal["auto", "model", "block"]
SHARE = 0.8
"""Of free memory that training the whole model may be predicted to take."""
SHARE_INSIDE, SHARE_WITH_INSIDE = 0.25, 0.6
"""Of free memory for the inside of blocks, kept between the passes instead of computed twice; and of all of it with
that: what is only to save time leaves room for what nobody has predicted."""


@dataclass(frozen=True)
class Choice:
    """How to train what, and why: bytes that this would take for the whole model at least, and bytes that are free.

    `kept_blocks`: of so many blocks the inside is kept for the backward pass; that of the others is computed again.
    """

    mode: Literal["model", "block"]
    train: What
    whole_model_bytes: int
    free: int
    kept_blocks: int = 0


LoadOf = Callable[[Trainable], predict.TrainingLoad]


def choose(asked: Mode, training: Trainable, load_of: LoadOf, device: torch.device) -> Choice:
    """`auto` trains the whole model where it fits: all that `training` names, or scales and norms where codes do not
    fit. Block by block codes come closer to the source's blocks and the model no closer to the source
    (docs/adr/0018-structured-pruning.md)."""
    free = free_bytes(device)
    choice = _choice(asked, training, load_of(training), free)
    if asked == "auto" and training.what == "codes" and choice.mode == "block":
        less = replace(training, what="scales+norms")
        return _choice(asked, less, load_of(less), free)
    return choice


def _choice(asked: Mode, training: Trainable, load: predict.TrainingLoad, free: int) -> Choice:
    whole = predict.whole_model_training_bytes(load)
    fitting: Literal["model", "block"] = "model" if whole <= SHARE * free else "block"
    spare = min(SHARE_WITH_INSIDE * free - whole, SHARE_INSIDE * free)
    kept = min(load.blocks, max(0, int(spare // predict.inside_bytes(load)))) if load.fused_attention else 0
    return Choice(fitting if asked == "auto" else asked, training.what, whole, free, kept)


def training_load(
    skeleton: Skeleton,
    schemes: dict[str, Scheme],
    training: Trainable,
    batch_tokens: int,
    kept_tokens: int,
    compute: torch.dtype,
) -> predict.TrainingLoad:
    """What decides the memory of training, from shapes. `schemes`: of what is quantised, of which linears count;
    `kept_tokens`: tokens of all windows."""
    shapes = skeleton.linear_shapes()
    schemes = {module: scheme for module, scheme in schemes.items() if module in shapes}
    quantised = sum(shapes[module][0] * shapes[module][1] for module in schemes)
    scales = sum(shapes[module][0] * scheme.free_scales(shapes[module][1]) for module, scheme in schemes.items())
    block = [*skeleton.block(0).parameters()]
    block_parameters = sum(parameter.numel() for parameter in block)
    vectors = sum(parameter.numel() for parameter in block if parameter.dim() == 1)
    count = skeleton.block_count
    trained = (scales if training.scales else 0) + (count * vectors if training.norms else 0)
    trained += quantised if training.what == "codes" else 0
    trained += count * block_parameters - quantised if training.what == "weights" else 0
    if training.what == "lora":
        trained += sum(training.rank * sum(shape) for module, shape in shapes.items() if module not in schemes)
    return predict.TrainingLoad(
        quantised=quantised,
        dense=count * block_parameters - quantised,
        trained=trained,
        moved=quantised if training.what == "codes" else 0,
        block_parameters=block_parameters,
        block_width=sum(rows + columns for rows, columns in shapes.values()) // count,
        blocks=count,
        hidden=int(skeleton.config.hidden_size),
        vocabulary=int(skeleton.config.vocab_size),
        batch_tokens=batch_tokens,
        kept_tokens=kept_tokens,
        compute_bytes=compute.itemsize,
        fused_attention=skeleton.config._attn_implementation != "eager",
    )
