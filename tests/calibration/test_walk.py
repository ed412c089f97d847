"""The walk: each block runs once, statistics see compressed weights before them, and nothing is kept too long."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch

from compress.architecture import InputGroup
from compress.calibration.statistics import InputStatistics
from compress.calibration.walk import (
    Stream,
    final_hidden_states,
    forward_of,
    replay_block,
    run_block,
    with_source_weights,
)
from compress.checkpoints.reader import Checkpoint
from compress.checkpoints.skeleton import Batch, Skeleton
from compress.events import Quiet
from tests.tiny import CPU, random_model, random_windows


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    random_model("llama", folder)
    return folder


def _setting(model, padded=False):
    checkpoint = Checkpoint(model)
    skeleton = Skeleton(checkpoint.config, CPU, torch.float32)
    batches = random_windows(padded=padded).batches(48)
    return checkpoint, skeleton, batches, skeleton.embed(checkpoint, batches)


def _halve(block, group):
    """Stands in for solving: every linear of the group gets other weights."""
    for name in group.linears:
        linear = block.get_submodule(name)
        linear.weight = torch.nn.Parameter(linear.weight.data * 0.5, requires_grad=False)


@torch.no_grad()
def _sequential_reference(block, groups, batches, states, forward):
    """True-sequential order the slow way: a whole forward per group, with plain hooks, then the group's new weights."""
    hessians = {}
    for group in groups:
        seen = []
        hook = block.get_submodule(group.linears[0]).register_forward_pre_hook(
            lambda module, args, seen=seen: seen.append(args[0].clone())
        )
        for number, hidden in enumerate(states):
            forward(block, number, hidden)
        hook.remove()
        rows = []
        for batch, inputs in zip(batches, seen, strict=True):
            flat = inputs.flatten(0, 1).double()
            rows.append(flat if batch.mask is None else flat[batch.mask.flatten().bool()])
        stacked = torch.cat(rows)
        hessians[group.name] = stacked.T @ stacked / len(stacked)
        _halve(block, group)
    return hessians, [forward(block, number, hidden) for number, hidden in enumerate(states)]


@torch.no_grad()
@pytest.mark.parametrize("walk", [run_block, replay_block], ids=["held", "replayed"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_statistics_and_outputs_equal_a_slow_sequential_reference(model, padded, walk):
    checkpoint, skeleton, batches, states = _setting(model, padded)
    groups = skeleton.architecture.groups
    forward = forward_of(skeleton, batches, 0)
    found: dict[str, InputStatistics] = {}
    with skeleton.loaded(checkpoint, "model.layers.0") as block:
        expected, outputs = _sequential_reference(copy.deepcopy(block), groups, batches, states, forward)
        stream = Stream(block, list(states))

        def on_input(group, number, here, there):
            assert there is None
            statistics = found.setdefault(group.name, InputStatistics(here.inputs.shape[-1], CPU))
            statistics.add(here.inputs, batches[number].mask)

        walk(stream, groups, forward, on_input, lambda group: _halve(block, group))

    for group in groups:
        torch.testing.assert_close(found[group.name].hessian()[0], expected[group.name], rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(stream.states, outputs, strict=True):
        torch.testing.assert_close(ours, theirs)


@torch.no_grad()
def test_a_block_runs_once_per_batch_however_many_groups_it_has(model):
    checkpoint, skeleton, batches, states = _setting(model)
    calls = []
    original = forward_of(skeleton, batches, 0)

    def forward(block, number, hidden):
        calls.append(number)
        return original(block, number, hidden)

    order = []
    with skeleton.loaded(checkpoint, "model.layers.0") as block:
        run_block(
            Stream(block, states),
            skeleton.architecture.groups,
            forward,
            lambda group, number, here, there: order.append((group.name, number)),
            lambda group: order.append((group.name, "solve")),
        )

    numbers = list(range(len(batches)))
    assert sorted(calls) == numbers
    expected = [(group.name, step) for group in skeleton.architecture.groups for step in [*numbers, "solve"]]
    assert order == expected


@torch.no_grad()
@pytest.mark.parametrize("walk", [run_block, replay_block], ids=["held", "replayed"])
def test_a_reference_stream_keeps_the_source_weights_and_is_held_at_the_same_places(model, walk):
    checkpoint, skeleton, batches, states = _setting(model)
    forward = forward_of(skeleton, batches, 0)
    differences = {}
    with skeleton.loaded(checkpoint, "model.layers.0") as block:
        untouched = [forward(block, number, hidden) for number, hidden in enumerate(states)]
        stream, reference = Stream(block, list(states)), Stream(with_source_weights(block), list(states))

        def on_input(group, number, here, there):
            differences.setdefault(group.name, []).append(float((here.inputs - there.inputs).abs().max()))

        walk(stream, skeleton.architecture.groups, forward, on_input, lambda group: _halve(block, group), reference)

    for ours, theirs in zip(reference.states, untouched, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert max(differences["attention_input"]) == 0, "nothing was compressed before the first group"
    assert min(differences["attention_output"]) > 0


@torch.no_grad()
def test_hidden_states_are_handed_over_and_gone_after_the_block(model):
    """While a batch is held its forward has the states, the list no longer does; afterwards nobody has."""
    checkpoint, skeleton, batches, states = _setting(model)
    watched = [weakref.ref(state) for state in states]
    stream = Stream(skeleton.block(0), states)
    del states
    listed = []

    with skeleton.loaded(checkpoint, "model.layers.0"):
        run_block(
            stream,
            skeleton.architecture.groups,
            forward_of(skeleton, batches, 0),
            lambda *_: None,
            lambda group: listed.append(sum(state.numel() for state in stream.states)),
        )

    assert listed == [0, 0, 0, 0]
    gc.collect()
    assert not any(reference() is not None for reference in watched)


def test_groups_in_the_wrong_order_are_an_error_that_names_both(model):
    checkpoint, skeleton, batches, states = _setting(model)
    wrong = (InputGroup("mlp_input", ("mlp.gate_proj",)), InputGroup("attention_input", ("self_attn.q_proj",)))

    with (
        skeleton.loaded(checkpoint, "model.layers.0") as block,
        pytest.raises(RuntimeError, match="expected mlp_input, the block reached attention_input"),
    ):
        run_block(Stream(block, states), wrong, forward_of(skeleton, batches, 0), lambda *_: None, lambda _: None)


def test_hooks_are_gone_after_an_error_in_the_middle(model):
    checkpoint, skeleton, batches, states = _setting(model)

    def fail(group):
        raise KeyboardInterrupt

    with skeleton.loaded(checkpoint, "model.layers.0") as block:
        with pytest.raises(KeyboardInterrupt):
            run_block(
                Stream(block, states),
                skeleton.architecture.groups,
                forward_of(skeleton, batches, 0),
                lambda *_: None,
                fail,
            )
        assert not any(module._forward_pre_hooks for module in block.modules())


def test_only_one_block_has_weights_at_a_time(model, monkeypatch):
    checkpoint, skeleton, batches, _ = _setting(model)
    resident = []
    from compress.checkpoints import skeleton as module

    load = module.load_module

    def counting(part, *arguments):
        load(part, *arguments)
        blocks = [skeleton.block(index) for index in range(skeleton.block_count)]
        resident.append(sum(all(p.device.type != "meta" for p in block.parameters()) for block in blocks))

    monkeypatch.setattr(module, "load_module", counting)
    list(final_hidden_states(skeleton, checkpoint, batches, Quiet(), ""))

    assert max(resident) == 1


@torch.no_grad()
def test_a_shorter_reference_is_compared_with_the_first_batches(model):
    checkpoint, skeleton, batches, states = _setting(model)
    compared = []
    with skeleton.loaded(checkpoint, "model.layers.0") as block:
        reference = Stream(with_source_weights(block), states[:1])
        run_block(
            Stream(block, list(states)),
            skeleton.architecture.groups,
            forward_of(skeleton, batches, 0),
            lambda group, number, here, there: compared.append((number, there is not None)),
            lambda group: None,
            reference,
        )

    assert len(batches) > 1 and set(compared) == {(number, number == 0) for number in range(len(batches))}
    assert len(reference.states) == 1


@torch.no_grad()
def test_the_residual_is_what_the_groups_output_is_added_to(model):
    """Block output = residual before the MLP + down_proj of its input; likewise for attention."""
    checkpoint, skeleton, batches, states = _setting(model)
    entering = [state.clone() for state in states]
    seen = {}
    with skeleton.loaded(checkpoint, "model.layers.0") as block:
        stream = Stream(block, states)

        def on_input(group, number, here, there):
            seen[group.name, number] = here

        run_block(stream, skeleton.architecture.groups, forward_of(skeleton, batches, 0), on_input, lambda _: None)
        for number, output in enumerate(stream.states):
            down, attention = seen["mlp_output", number], seen["attention_output", number]
            torch.testing.assert_close(down.residual + block.mlp.down_proj(down.inputs), output)
            assert torch.equal(attention.residual, entering[number])
            between = attention.residual + block.self_attn.o_proj(attention.inputs)
            torch.testing.assert_close(between, down.residual)
            assert seen["attention_input", number].residual is None


def test_a_batch_of_its_own_gives_the_same_states(model):
    """Neither batch size nor neighbours change what a window computes."""
    checkpoint, skeleton, _, _ = _setting(model)
    windows = random_windows()

    (together,) = final_hidden_states(skeleton, checkpoint, [Batch(windows.ids)], Quiet(), "")
    alone = list(final_hidden_states(skeleton, checkpoint, windows.batches(1), Quiet(), ""))

    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)
