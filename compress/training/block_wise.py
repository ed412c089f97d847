"""One block after another: on the inputs it will really see, each is trained to put out what the source's would.

For models whose codes and head do not fit in memory together. The student's hidden states x enter both blocks:

    minimise over the block's scales and norms   mean |student(x) - source(x)|^2 / mean |source(x)|^2

over real tokens (the objective of block-wise reconstruction, arXiv 2102.05426, here with frozen codes). Then x goes
through the trained block to the next. One block of each model is resident.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compress.calibration.walk import forward_of
from compress.checkpoints.reader import Checkpoint
from compress.checkpoints.skeleton import Skeleton
from compress.training.material import Material
from compress.training.student import Trained, factors


@dataclass(frozen=True)
class OneBlock:
    """An `Objective`: inputs and targets (windows, tokens, hidden) of block `index`, on the CPU."""

    skeleton: Skeleton
    material: Material
    index: int
    block: nn.Module
    inputs: Tensor
    targets: Tensor
    trained: Trained

    @property
    def factors(self) -> dict[str, nn.Parameter]:
        return factors(self.trained)

    def loss(self, rows: Tensor) -> Tensor | None:
        real = self.material.real(rows)
        wanted = self.targets[rows][real].to(self.skeleton.device).float()
        got = through(self.skeleton, self.material, self.index, self.block, self.inputs, rows)[real].float()
        return (got - wanted).square().mean() / wanted.square().mean() if len(wanted) else None

    @torch.no_grad()
    def held_out(self) -> float:
        """Squared error over the squared output of the source's block, on the windows kept out."""
        error, power = 0.0, 0.0
        for rows in self.material.held_out_batches():
            real = self.material.real(rows)
            wanted = self.targets[rows][real].to(self.skeleton.device).double()
            got = through(self.skeleton, self.material, self.index, self.block, self.inputs, rows)[real].double()
            error, power = error + float((got - wanted).square().sum()), power + float(wanted.square().sum())
        return error / max(power, 1e-30)


def through(
    skeleton: Skeleton, material: Material, index: int, block: nn.Module, states: Tensor, rows: Tensor
) -> Tensor:
    """Output (rows, tokens, hidden) of a block for some windows of `states` (windows, tokens, hidden)."""
    forward = forward_of(skeleton, [material.batch(rows)], index)
    return forward(block, 0, states[rows].to(skeleton.device))


@torch.no_grad()
def all_through(skeleton: Skeleton, material: Material, index: int, block: nn.Module, states: Tensor) -> Tensor:
    """The same for every window, on the CPU."""
    return torch.cat([through(skeleton, material, index, block, states, rows).cpu() for rows in material.every_batch()])


def source_outputs(skeleton: Skeleton, origin: Checkpoint, material: Material, index: int, states: Tensor) -> Tensor:
    """What the source's block `index` makes of the student's states."""
    with skeleton.loaded(origin, skeleton.architecture.block_name(index)) as block:
        return all_through(skeleton, material, index, block, states)
