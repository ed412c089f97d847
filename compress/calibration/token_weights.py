"""How much each calibration token matters to the model's output, for each group of linears: weights for its Hessian.

To second order an output error dy_t of a linear at token t costs 1/2 sum_r g_{t,r}^2 dy_{t,r}^2, with g the gradient of
the loss with respect to the output; so a token's outer product deserves the weight

    w_t = mean_r g_{t,r}^2

instead of 1. Labels are sampled from the model's own distribution, which makes g^2 the diagonal of the true Fisher
information (data labels would not). Outliers are clipped to the 5 % and 95 % quantiles, a tenth of the mean is blended
in so that no token vanishes, and the mean is 1. Source: GuidedQuant (arXiv 2505.07004), with one group of outputs.

Several processes (`compress.parallel`) take a share of the batches each. Labels are drawn with a seed for each batch,
so they do not depend on who draws them; quantiles and means are of the tokens of all.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from compress import parallel
from compress.calibration.backward import batches_together, on_output_gradients, walk_backward
from compress.checkpoints.reader import Checkpoint
from compress.checkpoints.skeleton import Batch, Skeleton
from compress.events import Progress

CLIP = (0.05, 0.95)
"""Quantiles that weights are clipped to."""
BLEND = 0.1
"""Share of the mean in every weight."""

TokenWeights = dict[tuple[int, str], list[Tensor]]
"""By block and group name: one tensor (windows, tokens) float32 a batch."""


def token_weights(
    skeleton: Skeleton,
    checkpoint: Checkpoint,
    batches: list[Batch],
    seed: int,
    progress: Progress,
    products: torch.dtype | None = None,
) -> TokenWeights:
    """Weights of every token of this process's `batches`, for every group of linears of `checkpoint`, which multiply in
    `products`; over the unmasked tokens of all processes the mean is 1."""
    squares: TokenWeights = {}
    together = batches_together(skeleton, batches)
    numbers = parallel.share(list(range(parallel.total(len(batches)))))
    seeds = [seed * 1_000_003 + number for number in numbers]
    with progress.task("token weights", len(batches)) as advance:
        for start in range(0, len(batches), together):
            part = batches[start : start + together]
            sums = _Sums(skeleton)
            walk_backward(skeleton, checkpoint, part, seeds[start:], sums.watch, products)
            for key, values in sums.means().items():
                squares.setdefault(key, []).extend(values)
            for _ in part:
                advance(f"batch {start + len(part)}/{len(batches)}")
    masks = parallel.in_order([batch.mask for batch in batches])
    return {key: parallel.share(normalised(parallel.in_order(values), masks)) for key, values in squares.items()}


def normalised(squares: list[Tensor], masks: list[Tensor | None]) -> list[Tensor]:
    """Mean squared gradients (windows, tokens) a batch -> clipped, blended weights with mean 1 over unmasked tokens.

    A gradient that is not finite, or nothing but zeros, says nothing: all weights are then 1.
    """
    flat = [value.flatten() if mask is None else value[mask.bool()] for value, mask in zip(squares, masks, strict=True)]
    every = torch.cat(flat)
    if not bool(torch.isfinite(every).all()) or float(every.max()) <= 0:
        return [torch.ones_like(value) for value in squares]
    ordered = every.sort().values
    low, high = (ordered[round(share * (len(ordered) - 1))] for share in CLIP)
    mean = float(every.clamp(low, high).mean())
    return [(1 - BLEND) * value.clamp(low, high) / mean + BLEND for value in squares]


class _Sums:
    """sum_r g_{t,r}^2 over the outputs of each group's linears, for every batch."""

    def __init__(self, skeleton: Skeleton) -> None:
        self._linears = skeleton.architecture.linears
        self._group_of = {name: group.name for group in skeleton.architecture.groups for name in group.linears}
        self._sums: dict[tuple[int, str], dict[int, tuple[Tensor, int]]] = {}

    @contextmanager
    def watch(self, index: int, number: int, block: nn.Module) -> Iterator[None]:
        def take(name: str, gradient: Tensor) -> None:
            sums = self._sums.setdefault((index, self._group_of[name]), {})
            before, rows = sums.get(number, (torch.zeros(()), 0))
            sums[number] = (before + gradient.float().square().sum(-1).cpu(), rows + gradient.shape[-1])

        with on_output_gradients(block, self._linears, take):
            yield

    def means(self) -> TokenWeights:
        """By block and group, (windows, tokens) float32 on the CPU, one a batch."""
        return {key: [total / rows for _, (total, rows) in sorted(sums.items())] for key, sums in self._sums.items()}
