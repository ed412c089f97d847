"""How much the model's loss depends on each piece of a linear's input: F_p = E_t[(sum_{c in p} x_{t,c} g_{t,c})^2].

g is the gradient of the model's loss, on labels sampled from itself, with respect to the input x of the linear, and the
sum is how much the loss changes, to first order, if piece p is removed at token t. Half its mean square over tokens is
what removing the piece costs in nats a token, by the diagonal of the Fisher information.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from compress.calibration.backward import batches_together, walk_backward
from compress.checkpoints.reader import Checkpoint
from compress.checkpoints.skeleton import Batch, Skeleton
from compress.events import Progress


def removal_effects(
    skeleton: Skeleton,
    checkpoint: Checkpoint,
    batches: list[Batch],
    widths: Mapping[str, int],
    seed: int,
    progress: Progress,
) -> dict[str, Tensor]:
    """F (pieces,) float32 on the CPU, by full name, of every block's linears named in `widths` (columns of a piece)."""
    sums: dict[str, Tensor] = {}
    together = batches_together(skeleton, batches)
    with progress.task("what removals cost", len(batches)) as advance:
        for start in range(0, len(batches), together):
            part = batches[start : start + together]
            seeds = [seed * 1_000_003 + start + offset for offset in range(len(part))]
            watcher = _Watcher(skeleton, part, widths, sums)
            walk_backward(skeleton, checkpoint, part, seeds, watcher.watch)
            for _ in part:
                advance(f"batch {start + len(part)}/{len(batches)}")
    tokens = sum(batch.tokens for batch in batches)
    return {name: total / tokens for name, total in sums.items()}


class _Watcher:
    """Adds up squares while a backward pass runs."""

    def __init__(
        self, skeleton: Skeleton, batches: list[Batch], widths: Mapping[str, int], sums: dict[str, Tensor]
    ) -> None:
        self.architecture, self.batches, self.widths, self.sums = skeleton.architecture, batches, widths, sums

    @contextmanager
    def watch(self, index: int, number: int, block: nn.Module) -> Iterator[None]:
        prefix = self.architecture.block_name(index)
        handles = [
            block.get_submodule(name).register_forward_pre_hook(self._hook(f"{prefix}.{name}", width, number))
            for name, width in self.widths.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, module: str, width: int, number: int):  # type: ignore[no-untyped-def]
        def on_input(linear: nn.Module, args: tuple[Tensor, ...]) -> None:
            del linear
            # Without its graph: a hook that knew the tensor it hangs on would keep the whole block alive.
            inputs = args[0].detach()
            args[0].register_hook(  # type: ignore[no-untyped-call]
                lambda gradient: self._take(module, width, number, inputs, gradient)
            )

        return on_input

    def _take(self, module: str, width: int, number: int, inputs: Tensor, gradient: Tensor) -> None:
        product = inputs.float() * gradient.float()
        effects = product.view(*product.shape[:-1], -1, width).sum(-1).square()
        mask = self.batches[number].mask
        if mask is not None:
            effects = effects * mask.to(effects).unsqueeze(-1)
        total = effects.sum((0, 1)).cpu()
        self.sums[module] = total if module not in self.sums else self.sums[module] + total
