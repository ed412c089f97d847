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

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import greenlet
import torch
from torch import Tensor, nn

from compress.architecture import InputGroup
from compress.calibration.products import multiplying_in
from compress.checkpoints.overlap import ReadAhead
from compress.checkpoints.reader import Checkpoint
from compress.checkpoints.skeleton import Batch, Skeleton
from compress.events import Progress
from compress.memory.measure import trim


@dataclass(frozen=True)
class Arrival:
    """What one batch brings to a group: its inputs (windows, tokens, columns) and, where the group names one, the
    residual stream (windows, tokens, hidden) that the group's output will be added to."""

    inputs: Tensor
    residual: Tensor | None = None


OnInput = Callable[[InputGroup, int, Arrival, Arrival | None], None]
"""Called with a group, the batch number, what the batch brings and, where a reference stream runs beside it for this
batch, what that brings for the same tokens; once a batch."""
OnGroup = Callable[[InputGroup], None]
"""Called when every batch has reached a group: the place to replace the group's weights."""
Forward = Callable[[nn.Module, int, Tensor], Tensor]
"""forward(block, number, hidden): a block's output for one batch."""


class _Held(greenlet.greenlet):
    """One batch's forward through a block; `reached` is the last group it was held at.

    `residuals` has the inputs of the modules that groups name as their residual; the forward keeps them alive anyway.
    """

    reached: InputGroup | None = None

    def __init__(self, run: Callable[..., Tensor]) -> None:
        super().__init__(run)
        self.residuals: dict[str, Tensor] = {}


@dataclass
class Stream:
    """A block and the hidden states entering it, per batch (windows, tokens, hidden); consumed by `run_block`."""

    block: nn.Module
    states: list[Tensor]


def run_block(
    stream: Stream,
    groups: tuple[InputGroup, ...],
    forward: Forward,
    on_input: OnInput,
    on_group: OnGroup,
    reference: Stream | None = None,
) -> None:
    """Run a block on every batch, holding all batches at every group of linears on the way.

    `stream.states` become the block's outputs. `reference` is the same block with its source weights, fed with the
    source's own hidden states: it is held at the same places, so that its inputs can be compared. It may have fewer
    batches than `stream`; the first ones are then compared.
    Raises RuntimeError if the block does not reach the groups in the order given: a wrong architecture entry.
    """
    streams = [stream] if reference is None else [stream, reference]
    held = [[_Held(forward) for _ in each.states] for each in streams]
    try:
        with _hooks(streams, groups):
            for position, group in enumerate(groups):
                for number in range(len(stream.states)):
                    arrived = [
                        _advance(flows[number], each, number, group, position == 0)
                        for each, flows in zip(streams, held, strict=True)
                        if number < len(flows)
                    ]
                    on_input(group, number, arrived[0], arrived[1] if len(arrived) > 1 else None)
                    del arrived
                on_group(group)
            for each, flows in zip(streams, held, strict=True):
                each.states = [flow.switch() for flow in flows]
    finally:
        for flow in (flow for flows in held for flow in flows):
            if flow:
                flow.throw()


@contextmanager
def _hooks(streams: list[Stream], groups: tuple[InputGroup, ...]) -> Iterator[None]:
    """Pre-hooks that hold a forward at every group and keep what groups name as their residual."""
    handles = [
        each.block.get_submodule(name).register_forward_pre_hook(_hold(group))
        for each in streams
        for group in groups
        for name in group.linears
    ]
    handles += [
        each.block.get_submodule(name).register_forward_pre_hook(_keep(name))
        for each in streams
        for name in {group.residual for group in groups if group.residual}
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def replay_block(
    stream: Stream,
    groups: tuple[InputGroup, ...],
    forward: Forward,
    on_input: OnInput,
    on_group: OnGroup,
    reference: Stream | None = None,
) -> None:
    """As `run_block`, but no batch is held: a block is run again, batch by batch, up to each group of linears.

    What is held of a batch inside a block is many times the states that enter it; here that is one batch's. States may
    be on the host (`kept_on_host`); each batch visits the block's device. Costs some two forward passes more a block.
    """
    streams = [stream] if reference is None else [stream, reference]
    device = next(stream.block.parameters()).device
    with _hooks(streams, groups):
        for group in groups:
            for number in range(len(stream.states)):
                flows = [(_Held(forward), each) for each in streams if number < len(each.states)]
                try:
                    arrived = [_replayed(flow, each, number, group, device) for flow, each in flows]
                    on_input(group, number, arrived[0], arrived[1] if len(arrived) > 1 else None)
                    del arrived
                finally:
                    for flow, _ in flows:
                        flow.throw()
            on_group(group)
    for each in streams:
        for number, states in enumerate(each.states):
            each.states[number] = like(states, forward(each.block, number, states.to(device)))


def _replayed(flow: _Held, stream: Stream, number: int, group: InputGroup, device: torch.device) -> Arrival:
    """Run one batch from the block's start to `group`."""
    arrived = flow.switch(stream.block, number, stream.states[number].to(device, non_blocking=True))
    while not flow.dead and arrived[0] is not group:
        arrived = flow.switch()
    if flow.dead:
        raise RuntimeError(f"architecture entry is wrong: the block never reached {group.name}")
    return Arrival(arrived[1], None if group.residual is None else flow.residuals[group.residual])


def kept_on_host(states: Tensor) -> Tensor:
    """A copy in host memory that a GPU reaches directly; the tensor itself on a CPU."""
    if states.device.type == "cpu":
        return states
    return torch.empty(states.shape, dtype=states.dtype, pin_memory=True).copy_(states)


def like(place: Tensor, states: Tensor) -> Tensor:
    """New states where the old ones, of the same shape, are kept: on the host in the old ones' memory."""
    return states if place.device == states.device else place.copy_(states)


def _advance(flow: _Held, stream: Stream, number: int, group: InputGroup, first: bool) -> Arrival:
    """Let one batch run on to `group` and return what it brings there."""
    if first:
        arrived = flow.switch(stream.block, number, stream.states[number])
        # The flow has the states now; keeping them here would hold every batch twice.
        stream.states[number] = stream.states[number].new_empty(0)
    else:
        arrived = flow.switch()
    if flow.dead or arrived[0] is not group:
        where = "its end" if flow.dead else arrived[0].name
        raise RuntimeError(f"architecture entry is wrong: expected {group.name}, the block reached {where}")
    residual = None if group.residual is None else flow.residuals.pop(group.residual)
    return Arrival(arrived[1], residual)


def with_source_weights(block: nn.Module) -> nn.Module:
    """A second block that shares `block`'s tensors; replacing a parameter of one leaves the other alone."""
    shared = {id(tensor): tensor for tensor in (*block.parameters(), *block.buffers())}
    return copy.deepcopy(block, shared)


def _hold(group: InputGroup) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    """A pre-hook that switches back to the walk the first time a batch reaches `group`."""

    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        current = greenlet.getcurrent()
        if isinstance(current, _Held) and current.reached is not group:
            current.reached = group
            assert current.parent is not None
            # Mixed precision belongs to the model's forward, not to who looks at it meanwhile.
            with torch.autocast(args[0].device.type, enabled=False):
                current.parent.switch((group, args[0]))

    return hook


def _keep(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    """A pre-hook that remembers what a module reads, until the group that is added to it takes it."""

    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        current = greenlet.getcurrent()
        if isinstance(current, _Held):
            current.residuals[name] = args[0]

    return hook


def forward_of(skeleton: Skeleton, batches: list[Batch], index: int, products: torch.dtype | None = None) -> Forward:
    """The forward of block `index` for batch `number`: the arguments are those the model itself would pass.

    `products`: what linears multiply in, where that is not what the skeleton computes in (`calibration.products`).
    """

    def forward(block: nn.Module, number: int, hidden: Tensor) -> Tensor:
        call = skeleton.call(batches[number], hidden, index)
        cache = {} if skeleton.cache is None else {"past_key_values": skeleton.cache}
        with multiplying_in(products or skeleton.dtype, skeleton):
            output = block(hidden, *call.args, **{**call.kwargs, **cache})
        states: Tensor = output[0] if isinstance(output, tuple) else output
        return states.to(hidden.dtype)

    return forward


@torch.no_grad()
def final_hidden_states(
    skeleton: Skeleton, checkpoint: Checkpoint, batches: list[Batch], progress: Progress, label: str
) -> Iterator[Tensor]:
    """Hidden states after the final norm, (windows, tokens, hidden) per batch: the walk with nothing to solve."""
    states = skeleton.embed(checkpoint, batches)
    names = [skeleton.architecture.block_name(index) for index in range(skeleton.block_count)]
    with (
        progress.task(label, skeleton.block_count) as advance,
        ReadAhead(checkpoint, names, skeleton.device, skeleton.dtype) as ahead,
    ):
        for index, name in enumerate(names):
            forward = forward_of(skeleton, batches, index)
            with skeleton.loaded(checkpoint, name, ahead.state(name)) as block:
                for number, hidden in enumerate(states):
                    states[number] = forward(block, number, hidden)
            trim()
            advance(f"block {index + 1}/{skeleton.block_count}")
    with skeleton.loaded(checkpoint, skeleton.architecture.final_norm) as norm:
        for hidden in states:
            yield norm(hidden)
