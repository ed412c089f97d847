"""The whole model at once: trained by the KL divergence of its next-token probabilities from the source's.

What the source computes is computed once, by the block walk, and kept as its final hidden states; so are the student's
embeddings, which are frozen. All blocks of the student are resident as codes, a byte a weight. Between the passes only
the hidden states entering each block are kept, and the inside of as many blocks as memory has room for; that of the
others is computed again when its gradient is due (activation checkpointing, arXiv 1604.06174).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from compress.calibration.products import multiplying_in
from compress.calibration.walk import final_hidden_states
from compress.checkpoints.skeleton import Call, Head, Skeleton
from compress.training import saved
from compress.training.descent import descend, steps_of
from compress.training.divergence import alike_in_bfloat16, held_out_divergence, mean_divergence
from compress.training.material import Material
from compress.training.setting import Outcome, Setting
from compress.training.student import teacher_head, train_norm, trained_block
from compress.training.trained import AllTrained, factors, rates, stored_values


@dataclass(frozen=True)
class WholeModel:
    """An `Objective`: inputs and targets (windows, tokens, hidden) are the student's embeddings and the teacher's
    normed final states; heads are (teacher's, student's), the student's norm trained or not. Of the last `kept_blocks`
    blocks the inside is kept for the backward pass, that of the others is computed again once that is gone."""

    skeleton: Skeleton
    material: Material
    inputs: Tensor
    targets: Tensor
    blocks: list[nn.Module]
    heads: tuple[Head, Head]
    trained: AllTrained
    products: torch.dtype = torch.float32
    """What linears multiply in while they train. Judging is in the compute dtype."""
    kept_blocks: int = 0
    narrow: Tensor | None = None
    """The weight of both heads in bfloat16, where that cannot tell them apart and products are of it."""
    hidden_share: float = 0.0
    """Of the loss: the squared difference of final hidden states over the teacher's square."""

    @property
    def factors(self) -> dict[str, nn.Parameter]:
        return factors(self.trained)

    def rates(self, way: float) -> dict[str, float]:
        return rates(self.trained, way)

    def loss(self, rows: Tensor) -> Tensor | None:
        counts = self.material.counts(rows)
        if not bool(counts.any()):
            return None
        with multiplying_in(self.products, self.skeleton):
            states = self._states(rows)[counts]
        targets = self._targets(rows)[counts]
        divergence = mean_divergence((self.heads[0], targets), (self.heads[1], states), self.narrow)
        if not self.hidden_share:
            return divergence
        distance = (states.float() - targets.float()).square().mean() / targets.float().square().mean()
        return divergence + self.hidden_share * distance

    @torch.no_grad()
    def held_out(self) -> float:
        """Mean KL divergence in nats over all counted tokens of the windows kept out."""
        batches = self.material.held_out_batches()
        states = ((rows, self._targets(rows), self._states(rows)) for rows in batches)
        return held_out_divergence(self.material, self.heads, states)

    def _targets(self, rows: Tensor) -> Tensor:
        return self.targets[rows].to(self.skeleton.device)

    def _states(self, rows: Tensor) -> Tensor:
        """The student's normed final states, (rows, tokens, hidden)."""
        hidden = self.inputs[rows].to(self.skeleton.device)
        calls = self.skeleton.calls(self.material.batch(rows), hidden)
        for index, (block, call) in enumerate(zip(self.blocks, calls, strict=True)):
            if index >= len(self.blocks) - self.kept_blocks or not torch.is_grad_enabled():
                hidden = _through(block, call, hidden)
            else:
                hidden = recomputed(_through, block, call, hidden, use_reentrant=False, preserve_rng_state=False)
        normed: Tensor = self.heads[1].norm(hidden)
        return normed


def _through(block: nn.Module, call: Call, hidden: Tensor) -> Tensor:
    output = block(hidden, *call.args, **call.kwargs)
    states: Tensor = output[0] if isinstance(output, tuple) else output
    return states


def train_whole_model(setting: Setting) -> Outcome:
    """Train all blocks together."""
    with (
        _student(setting, _targets(setting)) as student,
        setting.progress.task("recover", steps_of(setting.material, setting.course)) as advance,
    ):
        path = setting.folder / "step.safetensors"
        done = descend(student, setting.material, setting.course, path, setting.clock, advance)
        count = sum(factor.numel() for factor in student.factors.values())
        facts = {"trained_numbers": count, **done.facts()}
        return Outcome(stored_values(student.trained), done.before, done.after, facts)


@torch.no_grad()
def _targets(setting: Setting) -> Tensor:
    """The source's normed final states of every window, (windows, tokens, hidden) in the compute dtype, on the CPU."""
    path = setting.folder / "teacher.safetensors"
    found = saved.load(path)
    if found is not None:
        setting.clock.carry(found[1]["seconds"])
        return found[0]["states"]
    batches = [setting.material.batch(rows) for rows in setting.material.every_batch()]
    with setting.clock.timed("teacher"):
        walk = final_hidden_states(setting.teacher, setting.origin, batches, setting.progress, "source")
        states = torch.cat([hidden.cpu() for hidden in walk])
    saved.save(path, {"states": states}, {"seconds": setting.clock.seconds})
    return states


@contextmanager
def _student(setting: Setting, targets: Tensor) -> Iterator[WholeModel]:
    """All of the student with its head, loaded once."""
    skeleton, source, material = setting.skeleton, setting.source, setting.material
    batches = [material.batch(rows) for rows in material.every_batch()]
    inputs = torch.cat([states.cpu() for states in skeleton.embed(source, batches)])
    blocks: list[nn.Module] = []
    trained: AllTrained = {}
    for index in range(skeleton.block_count):
        block, found = trained_block(skeleton, source, index, setting.training, setting.unquantised)
        blocks.append(block)
        trained.update(found)
    with skeleton.head(source) as head:
        if setting.training.norms:
            path = skeleton.architecture.final_norm
            trained[f"{path}.weight"] = train_norm(head.norm, source, path)
        heads = teacher_head(setting.origin, head), head
        narrower = setting.products is torch.bfloat16 and head.weight.dtype is torch.float32
        narrower = narrower and alike_in_bfloat16(heads[0].weight, head.weight)
        yield WholeModel(
            skeleton,
            material,
            inputs,
            targets,
            blocks,
            heads,
            trained,
            setting.products,
            setting.kept_blocks,
            head.weight.bfloat16() if narrower else None,
            setting.hidden_share,
        )
