"""The block walk: one decoder block resident at a time, statistics and solving inside a single forward pass.

A statistic of a linear needs only the linear's *input*. So the forward pass of every batch is run up to the first
group of linears (those that read the attention input), held there, and once all batches are held the group is solved
and its weights replaced; then all go on, with compressed weights, to the next group:

    batch 0   norm ──▶ │q k v│ ──▶ attention ──▶ │o│ ──▶ norm ──▶ │gate up│ ──▶ act ──▶ │down│ ──▶ out
    batch 1   norm ──▶ │q k v│ ──▶ attention ──▶ │o│ ──▶ ...
                       ^ solved when all batches are held here, then on with the new weights

That gives GPTQ's true-sequential order at exactly one forward per block, with the block's own code: no architecture
is re-implemented and none is run twice. A forward is held by running it in a greenlet and switching out of it from a
pre-hook on the linear; everything stays in one thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import greenlet
import torch
from torch import Tensor, nn

from compress.architecture import InputGroup
from compress.checkpoints.reader import Checkpoint
from compress.checkpoints.skeleton import Batch, Skeleton
from compress.events import Progress

OnInput = Callable[[InputGroup, int, Tensor], None]
"""Called with a group, the batch number and the group's input (windows, tokens, columns), once a batch."""
OnGroup = Callable[[InputGroup], None]
"""Called when every batch has reached a group: the place to replace the group's weights."""


class _Held(greenlet.greenlet):
    """One batch's forward through a block; `reached` is the last group it was held at."""

    reached: InputGroup | None = None


def run_block(
    block: nn.Module,
    groups: tuple[InputGroup, ...],
    inputs: list[Tensor],
    forward: Callable[[nn.Module, int, Tensor], Tensor],
    on_input: OnInput,
    on_group: OnGroup,
) -> list[Tensor]:
    """Outputs of `block` for every batch, holding all batches at every group of linears on the way.

    inputs: hidden states per batch (windows, tokens, hidden); entries are dropped as they are consumed.
    forward(block, number, hidden): the block's output for one batch.
    Raises RuntimeError if the block does not reach the groups in the order given: a wrong architecture entry.
    """
    handles = [
        block.get_submodule(name).register_forward_pre_hook(_hold(group)) for group in groups for name in group.linears
    ]
    held = [_Held(forward) for _ in inputs]
    try:
        for position, group in enumerate(groups):
            for number, flow in enumerate(held):
                if position == 0:
                    arrived = flow.switch(block, number, inputs[number])
                    inputs[number] = inputs[number].new_empty(0)
                else:
                    arrived = flow.switch()
                if flow.dead or arrived[0] is not group:
                    where = "the end" if flow.dead else arrived[0].name
                    raise RuntimeError(f"architecture entry is wrong: expected {group.name}, the block reached {where}")
                on_input(group, number, arrived[1])
                del arrived
            on_group(group)
        return [flow.switch() for flow in held]
    finally:
        for handle in handles:
            handle.remove()
        for flow in held:
            if flow:
                flow.throw()


def _hold(group: InputGroup) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    """A pre-hook that switches back to the walk the first time a batch reaches `group`."""

    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        current = greenlet.getcurrent()
        if isinstance(current, _Held) and current.reached is not group:
            current.reached = group
            assert current.parent is not None
            current.parent.switch((group, args[0]))

    return hook


def forward_of(skeleton: Skeleton, batches: list[Batch], index: int) -> Callable[[nn.Module, int, Tensor], Tensor]:
    """The forward of block `index` for batch `number`: the arguments are those the model itself would pass."""

    def forward(block: nn.Module, number: int, hidden: Tensor) -> Tensor:
        call = skeleton.call(batches[number], hidden, index)
        output = block(hidden, *call.args, **call.kwargs)
        states: Tensor = output[0] if isinstance(output, tuple) else output
        return states

    return forward


@torch.no_grad()
def final_hidden_states(
    skeleton: Skeleton, checkpoint: Checkpoint, batches: list[Batch], progress: Progress, label: str
) -> Iterator[Tensor]:
    """Hidden states after the final norm, (windows, tokens, hidden) per batch: the walk with nothing to solve."""
    states = skeleton.embed(checkpoint, batches)
    with progress.task(label, skeleton.block_count) as advance:
        for index in range(skeleton.block_count):
            forward = forward_of(skeleton, batches, index)
            with skeleton.loaded(checkpoint, skeleton.architecture.block_name(index)) as block:
                for number, hidden in enumerate(states):
                    states[number] = forward(block, number, hidden)
            advance(f"block {index + 1}/{skeleton.block_count}")
    with skeleton.loaded(checkpoint, skeleton.architecture.final_norm) as norm:
        for hidden in states:
            yield norm(hidden)
