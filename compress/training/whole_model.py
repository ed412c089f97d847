"""The whole model at once: trained by the KL divergence of its next-token probabilities from the source's.

What the source computes is computed once, by the block walk, and kept as its final hidden states; so are the student's
embeddings, which are frozen. All blocks of the student are resident as codes, a byte a weight. Between the passes only
the hidden states entering each block are kept; a block's inside is computed again when its gradient is due
(activation checkpointing, arXiv 1604.06174).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from compress.calibration.walk import final_hidden_states
from compress.checkpoints.reader import Checkpoint
from compress.checkpoints.skeleton import Call, Head, Skeleton
from compress.events import Progress
from compress.training.divergence import divergences, mean_divergence
from compress.training.material import Material
from compress.training.student import AsExported, Trained, factors, train_norm, trained_block


@torch.no_grad()
def teacher_states(skeleton: Skeleton, origin: Checkpoint, material: Material, progress: Progress) -> Tensor:
    """The source's normed final states of every window, (windows, tokens, hidden) in the compute dtype, on the CPU."""
    batches = [material.batch(rows) for rows in material.every_batch()]
    return torch.cat([states.cpu() for states in final_hidden_states(skeleton, origin, batches, progress, "teacher")])


@dataclass(frozen=True)
class WholeModel:
    """An `Objective`: inputs and targets (windows, tokens, hidden) are the student's embeddings and the teacher's
    normed final states; heads are (teacher's, student's), the student's norm trained or not."""

    skeleton: Skeleton
    material: Material
    inputs: Tensor
    targets: Tensor
    blocks: list[nn.Module]
    heads: tuple[Head, Head]
    trained: Trained

    @property
    def factors(self) -> dict[str, nn.Parameter]:
        return factors(self.trained)

    def loss(self, rows: Tensor) -> Tensor | None:
        counts = self.material.counts(rows)
        if not bool(counts.any()):
            return None
        states, targets = self._states(rows, keep_inside=False)[counts], self._targets(rows)[counts]
        return mean_divergence((self.heads[0], targets), (self.heads[1], states))

    @torch.no_grad()
    def held_out(self) -> float:
        """Mean KL divergence in nats over all counted tokens of the windows kept out."""
        total, tokens = 0.0, 0
        for rows in self.material.held_out_batches():
            counts = self.material.counts(rows)
            states, targets = self._states(rows, keep_inside=True)[counts], self._targets(rows)[counts]
            if len(states):
                values = divergences((self.heads[0], targets), (self.heads[1], states))
                total, tokens = total + float(values.double().sum()), tokens + len(values)
        return total / max(1, tokens)

    def _targets(self, rows: Tensor) -> Tensor:
        return self.targets[rows].to(self.skeleton.device)

    def _states(self, rows: Tensor, keep_inside: bool) -> Tensor:
        """The student's normed final states, (rows, tokens, hidden)."""
        hidden = self.inputs[rows].to(self.skeleton.device)
        calls = self.skeleton.calls(self.material.batch(rows), hidden)
        for block, call in zip(self.blocks, calls, strict=True):
            if keep_inside:
                hidden = _through(block, call, hidden)
            else:
                hidden = recomputed(_through, block, call, hidden, use_reentrant=False, preserve_rng_state=False)
        normed: Tensor = self.heads[1].norm(hidden)
        return normed


def _through(block: nn.Module, call: Call, hidden: Tensor) -> Tensor:
    output = block(hidden, *call.args, **call.kwargs)
    states: Tensor = output[0] if isinstance(output, tuple) else output
    return states


@contextmanager
def whole_model(
    skeleton: Skeleton, origin: Checkpoint, source: AsExported, material: Material, targets: Tensor, norms: bool
) -> Iterator[WholeModel]:
    """Load all of the student `source` and the head of its teacher `origin`, whose final states `targets` are."""
    batches = [material.batch(rows) for rows in material.every_batch()]
    inputs = torch.cat([states.cpu() for states in skeleton.embed(source, batches)])
    blocks: list[nn.Module] = []
    trained: Trained = {}
    for index in range(skeleton.block_count):
        block, found = trained_block(skeleton, source, index, norms)
        blocks.append(block)
        trained.update(found)
    with skeleton.head(source) as head:
        if norms:
            path = skeleton.architecture.final_norm
            trained[f"{path}.weight"] = train_norm(head.norm, source, path)
        heads = _teacher_head(origin, head), head
        yield WholeModel(skeleton, material, inputs, targets, blocks, heads, trained)


def _teacher_head(origin: Checkpoint, student: Head) -> Head:
    """The source's head; the student's own where they are the same, as they are unless the export rounds them."""
    arch = origin.architecture
    weight = origin.dense(arch.embedding if origin.tied_head else arch.head).to(student.weight)
    return student if torch.equal(weight, student.weight) else replace(student, weight=weight)
