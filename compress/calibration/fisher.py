"""How much an error of each output of each linear matters to the model's output: lambda_r = E_t[g_{t,r}^2].

g is the gradient of the model's loss, on labels sampled from itself, with respect to a linear's output, summed over all
tokens that the output has an effect on. To second order an error dy of output r at token t adds 1/2 g_{t,r}^2 dy^2 to
the divergence from the model, so that rounding a weight matrix W to Q costs, in nats a token,

    1/2 sum_r lambda_r (W - Q)_r H (W - Q)_r^T,     H the mean outer product of the linear's inputs,

if gradients do not depend on the inputs, nor outputs on each other: the diagonal of the Fisher information, averaged.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from compress.calibration.backward import batches_together, on_output_gradients, walk_backward
from compress.checkpoints.reader import Checkpoint
from compress.checkpoints.skeleton import Batch, Skeleton
from compress.events import Progress


def output_sensitivities(
    skeleton: Skeleton, checkpoint: Checkpoint, batches: list[Batch], seed: int, progress: Progress
) -> dict[str, Tensor]:
    """lambda (rows,) float32 on the CPU of every linear of every block, by full name; unmasked tokens only."""
    rows = _Rows(skeleton)
    together = batches_together(skeleton, batches)
    with progress.task("what outputs matter", len(batches)) as advance:
        for start in range(0, len(batches), together):
            part = batches[start : start + together]
            rows.masks = [batch.mask for batch in part]
            seeds = [seed * 1_000_003 + start + offset for offset in range(len(part))]
            walk_backward(skeleton, checkpoint, part, seeds, rows.watch)
            for _ in part:
                advance(f"batch {start + len(part)}/{len(batches)}")
    tokens = sum(batch.tokens for batch in batches)
    return {name: total / tokens for name, total in rows.sums.items()}


class _Rows:
    """sum_t g_{t,r}^2 over tokens that are not padding."""

    def __init__(self, skeleton: Skeleton) -> None:
        self._architecture = skeleton.architecture
        self.masks: list[Tensor | None] = []
        self.sums: dict[str, Tensor] = {}

    @contextmanager
    def watch(self, index: int, number: int, block: nn.Module) -> Iterator[None]:
        prefix = self._architecture.block_name(index)

        def take(name: str, gradient: Tensor) -> None:
            squares = gradient.float().square()
            mask = self.masks[number]
            if mask is not None:
                squares = squares * mask.to(squares).unsqueeze(-1)
            full = f"{prefix}.{name}"
            total = squares.sum((0, 1)).cpu()
            self.sums[full] = total if full not in self.sums else self.sums[full] + total

        with on_output_gradients(block, self._architecture.linears, take):
            yield


def rounding_cost(difference: Tensor, hessian: Tensor, sensitivity: Tensor) -> float:
    """1/2 sum_r lambda_r dW_r H dW_r^T in nats a token. difference (rows, columns), hessian (columns, columns) float32,
    sensitivity (rows,)."""
    errors = ((difference @ hessian) * difference).sum(1).clamp_min(0)
    return 0.5 * float(torch.dot(errors.double(), sensitivity.to(errors.device).double()))
