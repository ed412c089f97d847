"""One block after another: on the inputs it will really see, each is trained to put out what the source's would.

For models whose codes and head do not fit in memory together. The student's hidden states x enter both blocks:

    minimise over the block's scales and norms   mean |student(x) - source(x)|^2 / mean |source(x)|^2

over real tokens (the objective of block-wise reconstruction, arXiv 2102.05426, here with frozen codes). Then x goes
through the trained block to the next. One block of each model is resident.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress.calibration.products import multiplying_in
from compress.calibration.walk import final_hidden_states, forward_of
from compress.checkpoints.reader import Checkpoint
from compress.checkpoints.skeleton import Skeleton
from compress.memory.measure import release
from compress.training import saved
from compress.training.descent import descend, steps_of
from compress.training.divergence import held_out_divergence
from compress.training.material import Material
from compress.training.setting import Outcome, Setting
from compress.training.student import teacher_head, trained_block
from compress.training.trained import AllTrained, factors, rates, stored_values


@dataclass(frozen=True)
class OneBlock:
    """An `Objective`: inputs and targets (windows, tokens, hidden) of block `index`, on the CPU."""

    skeleton: Skeleton
    material: Material
    index: int
    block: nn.Module
    inputs: Tensor
    targets: Tensor
    trained: AllTrained
    products: torch.dtype = torch.float32

    @property
    def factors(self) -> dict[str, nn.Parameter]:
        return factors(self.trained)

    def rates(self, way: float) -> dict[str, float]:
        return rates(self.trained, way)

    def loss(self, rows: Tensor) -> Tensor | None:
        real = self.material.real(rows)
        wanted = self.targets[rows][real].to(self.skeleton.device).float()
        with multiplying_in(self.products, self.skeleton):
            got = _through(self.skeleton, self.material, self.index, self.block, self.inputs, rows)[real].float()
        return (got - wanted).square().mean() / wanted.square().mean() if len(wanted) else None

    @torch.no_grad()
    def held_out(self) -> float:
        """Squared error over the squared output of the source's block, on the windows kept out."""
        error, power = 0.0, 0.0
        for rows in self.material.held_out_batches():
            real = self.material.real(rows)
            wanted = self.targets[rows][real].to(self.skeleton.device).double()
            got = _through(self.skeleton, self.material, self.index, self.block, self.inputs, rows)[real].double()
            error, power = error + float((got - wanted).square().sum()), power + float(wanted.square().sum())
        return error / max(power, 1e-30)


def train_block_wise(setting: Setting) -> Outcome:
    """Train one block after another; judged at the end by the same divergence as training the whole model."""
    skeleton, material = setting.skeleton, setting.material
    with setting.clock.timed("teacher"):
        wanted = _final_states(setting, setting.teacher, setting.origin)
        before = _final_states(setting, skeleton, setting.source)
    batches = [material.batch(rows) for rows in material.every_batch()]
    states = torch.cat([hidden.cpu() for hidden in skeleton.embed(setting.source, batches)])
    values: dict[str, Tensor] = {}
    blocks: list[dict[str, Any]] = []
    with setting.progress.task("recover", skeleton.block_count * steps_of(material, setting.course)) as advance:
        for index in range(skeleton.block_count):
            states, found, facts = _train_block(setting, index, states, advance)
            values |= found
            blocks.append(facts)
            release()
    with skeleton.loaded(setting.source, skeleton.architecture.final_norm) as norm, torch.no_grad():
        after = [norm(states[rows].to(skeleton.device)) for rows in material.held_out_batches()]
    with skeleton.head(setting.source) as head:
        heads = teacher_head(setting.origin, head), head
        judged = [
            held_out_divergence(material, heads, zip(material.held_out_batches(), wanted, got, strict=True))
            for got in (before, after)
        ]
    count = sum(facts.pop("trained_numbers") for facts in blocks)
    return Outcome(values, judged[0], judged[1], {"trained_numbers": count, "blocks": blocks})


def _final_states(setting: Setting, skeleton: Skeleton, checkpoint: Checkpoint) -> list[Tensor]:
    """A model's normed final states on the windows kept out, per batch."""
    batches = [setting.material.batch(rows) for rows in setting.material.held_out_batches()]
    return list(final_hidden_states(skeleton, checkpoint, batches, setting.progress, "kept-out windows"))


def _train_block(
    setting: Setting, index: int, states: Tensor, advance: Callable[[str], None]
) -> tuple[Tensor, dict[str, Tensor], dict[str, Any]]:
    """Train a block, or take what an interrupted run made of it. Returns the states after it, its tensors and facts."""
    path, step = setting.folder / f"block-{index:05d}.safetensors", setting.folder / "step.safetensors"
    skeleton, material = setting.skeleton, setting.material
    block, trained = trained_block(skeleton, setting.source, index, setting.training, setting.unquantised)
    found = saved.load(path)
    if found is None:
        with (
            setting.clock.timed("teacher"),
            setting.teacher.loaded(setting.origin, skeleton.architecture.block_name(index)) as teacher,
        ):
            targets = _all_through(setting.teacher, material, index, teacher, states)
        objective = OneBlock(skeleton, material, index, block, states, targets, trained, setting.products)
        done = descend(objective, material, setting.course, step, setting.clock, advance)
        facts = done.facts() | {"error_before": done.before, "error_after": done.after}
        saved.save(path, objective.factors, facts | {"seconds": setting.clock.seconds})
        step.unlink(missing_ok=True)
    else:
        facts = found[1]
        setting.clock.carry(facts.pop("seconds"))
        with torch.no_grad():
            for name, factor in factors(trained).items():
                factor.copy_(found[0][name])
        for _ in range(steps_of(material, setting.course)):
            advance("going on")
        step.unlink(missing_ok=True)
    with setting.clock.timed("forward"):
        states = _all_through(skeleton, material, index, block, states)
    count = sum(factor.numel() for factor in factors(trained).values())
    return states, stored_values(trained), facts | {"trained_numbers": count}


def _through(
    skeleton: Skeleton, material: Material, index: int, block: nn.Module, states: Tensor, rows: Tensor
) -> Tensor:
    """Output (rows, tokens, hidden) of a block for some windows of `states` (windows, tokens, hidden)."""
    forward = forward_of(skeleton, [material.batch(rows)], index)
    return forward(block, 0, states[rows].to(skeleton.device))


@torch.no_grad()
def _all_through(skeleton: Skeleton, material: Material, index: int, block: nn.Module, states: Tensor) -> Tensor:
    """The same for every window, on the CPU."""
    return torch.cat(
        [_through(skeleton, material, index, block, states, rows).cpu() for rows in material.every_batch()]
    )
