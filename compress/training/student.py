"""Blocks of a quantised model with trained scales and norms in them; the rest is frozen, as it will be exported.

A block is transformers' own. Its quantised linears are swapped for `QuantisedLinear`, and each norm gets its weight
from a `Relative` just before it runs. The same functions serve a block of any architecture and the final norm.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress.checkpoints.reader import Checkpoint
from compress.checkpoints.skeleton import Head, Skeleton, load_module
from compress.training.quantised import QuantisedLinear
from compress.training.relative import Relative

Trained = dict[str, Relative]
"""Trained tensors by the full name they are stored under: <linear>.scale, <norm>.weight."""


class AsExported(Checkpoint):
    """A checkpoint as an export will hold it: floating tensors are those of the stored dtype."""

    def __init__(self, folder: Path, stored: torch.dtype) -> None:
        super().__init__(folder)
        self.stored = stored

    def read(self, name: str) -> Tensor:
        tensor = super().read(name)
        return tensor.to(self.stored) if tensor.is_floating_point() else tensor


def trained_block(skeleton: Skeleton, checkpoint: AsExported, index: int, norms: bool) -> tuple[nn.Module, Trained]:
    """Block `index` on the device in the compute dtype, and what is trained in it. The skeleton's own stays on meta."""
    arch, prefix = skeleton.architecture, skeleton.architecture.block_name(index)
    block = copy.deepcopy(skeleton.block(index))
    load_module(block, checkpoint.dense_state(prefix), skeleton.device, skeleton.dtype)
    trained: Trained = {}
    for name in arch.linears:
        module = f"{prefix}.{name}"
        if module in checkpoint.schemes:
            codes, grid = checkpoint.codes(module)
            linear = QuantisedLinear(codes, grid, getattr(block.get_submodule(name), "bias", None)).to(skeleton.device)
            block.set_submodule(name, linear)
            trained[f"{module}.scale"] = linear.scale
    if norms:
        for path, norm in [*block.named_modules()]:
            if _is_norm(norm):
                trained[f"{prefix}.{path}.weight"] = train_norm(norm, checkpoint, f"{prefix}.{path}")
    return block, trained


def train_norm(norm: nn.Module, checkpoint: AsExported, path: str) -> Relative:
    """Have a loaded norm take its weight (width,) from a `Relative` at every forward, and return that."""
    weight = norm.get_parameter("weight")
    base = checkpoint.read(f"{path}.weight").to(weight.device)
    trained = Relative(base, offset=checkpoint.architecture.norm_offset)
    compute = weight.dtype
    del norm.weight
    norm.add_module("trained", trained.to(weight.device))

    def refresh(module: nn.Module, args: tuple[Any, ...]) -> None:
        del args
        module.weight = trained().to(compute)

    norm.register_forward_pre_hook(refresh)
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


def factors(trained: Trained) -> dict[str, nn.Parameter]:
    """What an optimiser moves, by stored name."""
    return {name: relative.factor for name, relative in trained.items()}


def stored_values(trained: Trained) -> dict[str, Tensor]:
    """The tensors to write, in the stored dtype, on the CPU."""
    return {name: relative.stored().cpu() for name, relative in trained.items()}
