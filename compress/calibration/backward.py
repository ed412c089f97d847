"""Gradients of the model's own loss, block by block: what outputs and tokens matter to.

Labels are sampled from the model's own distribution, so that squared gradients are the diagonal of the true Fisher
information (data labels would not be). Hidden states entering every block are kept for a few batches at a time, and
each block is run again, this time with gradients. One block is resident.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from compress.calibration.draws import tokens_drawn
from compress.calibration.walk import forward_of
from compress.checkpoints.reader import Checkpoint
from compress.checkpoints.skeleton import Batch, Head, Skeleton
from compress.memory.measure import trim
from compress.quantization.inputs import run_as_before

KEPT_BYTES = 256 * 2**20
"""Bytes of hidden states kept for the backward pass: decides how many batches go through it together."""
TOKENS_AT_ONCE = 64
"""Tokens whose logits are formed at a time."""

Watch = Callable[[int, int, nn.Module], AbstractContextManager[None]]
"""watch(index, number, block): entered before block `index` runs forward and backward for one batch, left after."""


def batches_together(skeleton: Skeleton, batches: list[Batch]) -> int:
    """How many batches of this size go through a backward pass together."""
    hidden = int(skeleton.config.hidden_size)
    kept = skeleton.block_count * batches[0].ids.numel() * hidden * skeleton.dtype.itemsize
    return max(1, KEPT_BYTES // kept)


def walk_backward(
    skeleton: Skeleton,
    checkpoint: Checkpoint,
    batches: list[Batch],
    seeds: list[int],
    watch: Watch,
    products: torch.dtype | None = None,
    after_block: Callable[[int], None] = lambda index: None,
    waiting: Path | None = None,
) -> None:
    """Forward through all blocks, then backward block by block. `seeds`: of each batch's labels; `products`: what
    linears multiply in, where that is not what the skeleton computes in; `after_block`: called when all batches have
    gone back through a block; `waiting`: a folder where the states entering each block wait, in place of memory."""
    arch = skeleton.architecture
    entering: list[list[Tensor] | Path] = []
    with torch.no_grad():
        states = skeleton.embed(checkpoint, batches)
        for index in range(skeleton.block_count):
            entering.append(states if waiting is None else _put(waiting / f"entering-{index:05d}", states))
            forward = forward_of(skeleton, batches, index, products)
            with skeleton.loaded(checkpoint, arch.block_name(index)) as block:
                states = [forward(block, number, hidden) for number, hidden in enumerate(states)]
            trim()
    with skeleton.head(checkpoint, products) as head:
        gradients = [
            _loss_gradient(head, hidden, seed, batch.mask)
            for hidden, seed, batch in zip(states, seeds, batches, strict=False)
        ]
    del states
    for index in reversed(range(skeleton.block_count)):
        forward = forward_of(skeleton, batches, index, products)
        with skeleton.loaded(checkpoint, arch.block_name(index)) as block:
            # Integers have no gradient: linears that compute with them do so with their weights' values here.
            run_as_before(block)
            before = entering.pop()
            for number, hidden in enumerate(_taken(before, skeleton.device) if isinstance(before, Path) else before):
                with watch(index, number, block), torch.enable_grad():
                    leaf = hidden.detach().requires_grad_(True)
                    output = forward(block, number, leaf)
                    torch.autograd.backward(output, gradients[number])
                assert leaf.grad is not None
                gradients[number] = leaf.grad
        trim()
        after_block(index)


def _put(path: Path, states: list[Tensor]) -> Path:
    save_file({f"{number:06d}": hidden.contiguous() for number, hidden in enumerate(states)}, path)
    return path


def _taken(path: Path, device: torch.device) -> Iterator[Tensor]:
    """One batch's states after the other; the file goes when all have been taken."""
    with safe_open(path, "pt") as file:
        for key in sorted(file.keys()):
            yield file.get_tensor(key).to(device)
    path.unlink()


@contextmanager
def on_output_gradients(
    block: nn.Module, linears: tuple[str, ...], take: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Calls take(name, gradient (windows, tokens, rows)) for the output of each linear while a backward pass runs."""

    def watching(name: str) -> Callable[..., None]:
        def on_output(module: nn.Module, args: object, output: Tensor) -> None:
            output.register_hook(lambda gradient: take(name, gradient))  # type: ignore[no-untyped-call]

        return on_output

    handles = [block.get_submodule(name).register_forward_hook(watching(name)) for name in linears]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _loss_gradient(head: Head, hidden: Tensor, seed: int, mask: Tensor | None) -> Tensor:
    """d(-log p(label))/d hidden, summed over tokens that are not padding, for labels sampled from p; hidden (windows,
    tokens, hidden)."""
    generator = torch.Generator(device=hidden.device).manual_seed(seed)
    with torch.enable_grad():
        leaf = hidden.detach().requires_grad_(True)
        normed = head.norm(leaf)
        rows = normed.detach().flatten(0, -2)
        parts = []
        for start in range(0, len(rows), TOKENS_AT_ONCE):
            part = rows[start : start + TOKENS_AT_ONCE].requires_grad_(True)
            logits = head.differentiable_logits(part)
            # Where a model overflows any label will do: the gradient is not finite, and those who get it say so.
            likely = logits.detach().softmax(-1)
            labels = tokens_drawn(likely, generator)
            # d(-log p(label))/d logits = p - [label]
            torch.autograd.backward(logits, likely.scatter_add_(1, labels, -torch.ones_like(likely[:, :1])))
            assert part.grad is not None
            parts.append(part.grad)
        gradient = torch.cat(parts).reshape(normed.shape)
        if mask is not None:
            gradient = gradient * mask.to(gradient).unsqueeze(-1)
        torch.autograd.backward(normed, gradient)
    assert leaf.grad is not None
    return leaf.grad
