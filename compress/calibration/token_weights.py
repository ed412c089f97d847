"""How much each calibration token matters to the model's output, for each group of linears: weights for its Hessian.

To second order an output error dy_t of a linear at token t costs 1/2 sum_r g_{t,r}^2 dy_{t,r}^2, with g the gradient of
the loss with respect to the output; so a token's outer product deserves the weight

    w_t = mean_r g_{t,r}^2

instead of 1. Labels are sampled from the model's own distribution, which makes g^2 the diagonal of the true Fisher
information (data labels would not). Outliers are clipped to the 5 % and 95 % quantiles, a tenth of the mean is blended
in so that no token vanishes, and the mean is 1. Source: GuidedQuant (arXiv 2505.07004), with one group of outputs.

One backward pass through the source: hidden states entering every block are kept for a few windows at a time, and each
block is run again, this time with gradients. One block is resident.

Several processes (`compress.parallel`) take a share of the batches each. Labels are drawn with a seed for each batch,
so they do not depend on who draws them; quantiles and means are of the tokens of all.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from compress import parallel
from compress.calibration.walk import forward_of
from compress.checkpoints.reader import Checkpoint
from compress.checkpoints.skeleton import Batch, Head, Skeleton
from compress.events import Progress

KEPT_BYTES = 256 * 2**20
"""Bytes of hidden states kept for the backward pass: decides how many batches go through it together."""
CLIP = (0.05, 0.95)
"""Quantiles that weights are clipped to."""
BLEND = 0.1
"""Share of the mean in every weight."""
TOKENS_AT_ONCE = 64
"""Tokens whose logits are formed at a time."""

TokenWeights = dict[tuple[int, str], list[Tensor]]
"""By block and group name: one tensor (windows, tokens) float32 a batch."""


def token_weights(
    skeleton: Skeleton, checkpoint: Checkpoint, batches: list[Batch], seed: int, progress: Progress
) -> TokenWeights:
    """Weights of every token of this process's `batches`, for every group of linears of `checkpoint`; over the
    unmasked tokens of all processes the mean is 1."""
    squares: TokenWeights = {}
    first = batches[0].ids
    kept = skeleton.block_count * first.numel() * int(skeleton.config.hidden_size) * skeleton.dtype.itemsize
    together = max(1, KEPT_BYTES // kept)
    numbers = parallel.share(list(range(parallel.total(len(batches)))))
    seeds = [seed * 1_000_003 + number for number in numbers]
    with progress.task("token weights", len(batches)) as advance:
        for start in range(0, len(batches), together):
            part = batches[start : start + together]
            for key, values in _squared_gradients(skeleton, checkpoint, part, seeds[start:]).items():
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


def _squared_gradients(
    skeleton: Skeleton, checkpoint: Checkpoint, batches: list[Batch], seeds: list[int]
) -> TokenWeights:
    """mean_r g_{t,r}^2 for a few batches: forward through all blocks, then backward block by block. `seeds`: of each
    batch's labels."""
    arch = skeleton.architecture
    entering: list[list[Tensor]] = []
    with torch.no_grad():
        states = skeleton.embed(checkpoint, batches)
        for index in range(skeleton.block_count):
            entering.append(states)
            forward = forward_of(skeleton, batches, index)
            with skeleton.loaded(checkpoint, arch.block_name(index)) as block:
                states = [forward(block, number, hidden) for number, hidden in enumerate(states)]
    with skeleton.head(checkpoint) as head:
        gradients = [_loss_gradient(head, hidden, seed) for hidden, seed in zip(states, seeds, strict=False)]
    del states
    found: TokenWeights = {}
    for index in reversed(range(skeleton.block_count)):
        forward = forward_of(skeleton, batches, index)
        with skeleton.loaded(checkpoint, arch.block_name(index)) as block:
            for number, hidden in enumerate(entering.pop()):
                sums = _Sums(block, {group.name: group.linears for group in arch.groups})
                with torch.enable_grad():
                    leaf = hidden.detach().requires_grad_(True)
                    output = forward(block, number, leaf)
                    torch.autograd.backward(output, gradients[number])
                assert leaf.grad is not None
                gradients[number] = leaf.grad
                for name, value in sums.means().items():
                    found.setdefault((index, name), []).append(value)
    return found


class _Sums:
    """Collects sum_r g_{t,r}^2 of every linear's output while a backward pass runs."""

    def __init__(self, block: nn.Module, groups: dict[str, tuple[str, ...]]) -> None:
        self._sums: dict[str, list[tuple[Tensor, int]]] = {name: [] for name in groups}
        self._handles = [
            block.get_submodule(linear).register_forward_hook(self._watch(name))
            for name, linears in groups.items()
            for linear in linears
        ]

    def _watch(self, name: str) -> Callable[..., None]:
        def on_output(module: nn.Module, args: object, output: Tensor) -> None:
            def on_gradient(gradient: Tensor) -> None:
                self._sums[name].append((gradient.float().square().sum(-1), gradient.shape[-1]))

            output.register_hook(on_gradient)  # type: ignore[no-untyped-call]

        return on_output

    def means(self) -> dict[str, Tensor]:
        """By group, (windows, tokens) float32 on the CPU."""
        for handle in self._handles:
            handle.remove()
        return {
            name: (torch.stack([value for value, _ in parts]).sum(0) / sum(rows for _, rows in parts)).cpu()
            for name, parts in self._sums.items()
        }


def _loss_gradient(head: Head, hidden: Tensor, seed: int) -> Tensor:
    """d(-log p(label))/d hidden, summed over tokens, for labels sampled from p; hidden (windows, tokens, hidden)."""
    generator = torch.Generator(device=hidden.device).manual_seed(seed)
    with torch.enable_grad():
        leaf = hidden.detach().requires_grad_(True)
        normed = head.norm(leaf)
        rows = normed.detach().flatten(0, -2)
        parts = []
        for start in range(0, len(rows), TOKENS_AT_ONCE):
            part = rows[start : start + TOKENS_AT_ONCE].requires_grad_(True)
            logits = head.differentiable_logits(part)
            labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator).squeeze(1)
            torch.autograd.backward(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
            assert part.grad is not None
            parts.append(part.grad)
        torch.autograd.backward(normed, torch.cat(parts).reshape(normed.shape))
    assert leaf.grad is not None
    return leaf.grad
