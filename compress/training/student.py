"""Blocks of a model with trained tensors in them; the rest is frozen, as it will be exported.

A block is transformers' own. Its quantised linears are swapped for `QuantisedLinear`; norms, and linears that are not
quantised where those are trained, get their weights from what is trained just before they run. The same functions serve
a block of any architecture and the final norm.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress.checkpoints.reader import Checkpoint
from compress.checkpoints.skeleton import Head, Skeleton, load_module
from compress.training.quantised import MovedCodes, QuantisedLinear, towards
from compress.training.relative import Relative
from compress.training.trained import Adapter, AllTrained, Moved, Trainable, adapted


class AsExported(Checkpoint):
    """A checkpoint as an export will hold it: floating tensors are those of the stored dtype, but for scales of
    super-blocks, which are float16 whatever a model is stored in."""

    def __init__(self, folder: Path, stored: torch.dtype) -> None:
        super().__init__(folder)
        self.stored = stored

    def read(self, name: str) -> Tensor:
        tensor = super().read(name)
        owner = self.quantised_owner(name)
        if owner is not None and self.schemes[owner].of_super_blocks:
            return tensor
        return tensor.to(self.stored) if tensor.is_floating_point() else tensor


Unquantised = Callable[[str], Tensor | None]


def trained_block(
    skeleton: Skeleton, checkpoint: AsExported, index: int, training: Trainable, unquantised: Unquantised
) -> tuple[nn.Module, AllTrained]:
    """Block `index` on the device in the compute dtype, and what is trained in it. The skeleton's own stays on meta.

    `unquantised`: weights by linear as they were before they were quantised, None where nobody knows: they tell trained
    codes where to start."""
    arch, prefix = skeleton.architecture, skeleton.architecture.block_name(index)
    block = copy.deepcopy(skeleton.block(index))
    load_module(block, checkpoint.dense_state(prefix), skeleton.device, skeleton.dtype)
    trained: AllTrained = {}
    plain = []
    for name in arch.linears:
        module = f"{prefix}.{name}"
        if module not in checkpoint.schemes:
            plain.append(name)
            continue
        codes, grid = checkpoint.codes(module)
        bias = getattr(block.get_submodule(name), "bias", None)
        moved = None
        if training.what == "codes":
            weight = unquantised(module)
            moved = MovedCodes(codes, grid.scheme, None if weight is None else towards(codes, grid, weight))
        linear = QuantisedLinear(codes, grid, bias, moved).to(skeleton.device)
        block.set_submodule(name, linear)
        if training.scales:
            trained[f"{module}.scale"] = linear.scale
        if linear.moved is not None:
            trained[f"{module}.codes"] = linear.moved
    if training.norms:
        for path, norm in [*block.named_modules()]:
            if _is_norm(norm):
                trained[f"{prefix}.{path}.weight"] = train_norm(norm, checkpoint, f"{prefix}.{path}")
    if training.what == "weights":
        for name in plain:
            trained[f"{prefix}.{name}.weight"] = _train_weight(
                block.get_submodule(name), checkpoint, f"{prefix}.{name}"
            )
    if training.what == "lora" and plain:
        adapted(block, plain, training, training.seed * 1_000_003 + index, arch.transposed_linears)
        for name in plain:
            base = checkpoint.read(f"{prefix}.{name}.weight")
            trained[f"{prefix}.{name}.weight"] = Adapter(base, block.get_submodule(name))
        block.to(skeleton.device)
    return block, trained


def _train_weight(linear: nn.Module, checkpoint: AsExported, path: str) -> Moved:
    """Have a loaded linear take its weight from a `Moved` at every forward, and return that."""
    weight = linear.get_parameter("weight")
    trained = Moved(checkpoint.read(f"{path}.weight").to(weight.device))
    _take_from(linear, trained, weight.dtype)
    return trained


def _take_from(module: nn.Module, trained: nn.Module, compute: torch.dtype) -> None:
    """Have `module.weight` be what `trained()` gives, in the compute dtype, at every forward."""
    del module.weight
    module.add_module("trained", trained)

    def refresh(owner: nn.Module, args: tuple[Any, ...]) -> None:
        del args
        owner.weight = trained().to(compute)

    module.register_forward_pre_hook(refresh)


def train_norm(norm: nn.Module, checkpoint: AsExported, path: str) -> Relative:
    """Have a loaded norm take its weight (width,) from a `Relative` at every forward, and return that."""
    weight = norm.get_parameter("weight")
    base = checkpoint.read(f"{path}.weight").to(weight.device)
    trained = Relative(base, offset=checkpoint.architecture.norm_offset).to(weight.device)
    _take_from(norm, trained, weight.dtype)
    return trained


def _is_norm(module: nn.Module) -> bool:
    """One weight a channel: that is a norm in every architecture here; embeddings and linears have matrices."""
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() == 1


def teacher_head(origin: Checkpoint, student: Head) -> Head:
    """The source's head; the student's own where they are the same, as they are unless the export rounds them."""
    arch = origin.architecture
    weight = origin.dense(arch.embedding if origin.tied_head else arch.head).to(student.weight)
    return student if torch.equal(weight, student.weight) else replace(student, weight=weight)
