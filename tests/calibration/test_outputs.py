"""What a backward pass tells of outputs, tokens and heads: by autograd through transformers' own model."""

from __future__ import annotations

import pytest
import torch

from compress.architecture import architecture_of, dimensions_of
from compress.calibration import backward, outputs
from compress.calibration.outputs import SHARE, evenly, moment_shapes, outputs_of, starts_of
from compress.checkpoints.reader import Checkpoint
from compress.checkpoints.skeleton import Skeleton
from compress.events import Quiet
from compress.quantization.kv_cache import rounded
from compress.stages import RoundToNearest
from tests.tiny import CPU, apply_stage, random_model, random_windows


def told(folder, windows, tokens, path, at_once=64):
    checkpoint = Checkpoint(folder)
    skeleton = Skeleton(checkpoint.config, CPU, torch.float32)
    return skeleton, outputs_of(skeleton, checkpoint, windows, tokens, at_once, 3, Quiet(), path)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "phi3"])
def test_they_are_those_of_the_whole_model(name, tmp_path, monkeypatch):
    """Its loss on the same sampled labels: every linear of the first block."""
    model = random_model(name, tmp_path)
    windows = random_windows(count=2)
    batches = windows.batches(1000)
    labels, original = [], backward.tokens_drawn

    def remembering(*arguments, **options):
        labels.append(original(*arguments, **options))
        return labels[-1]

    monkeypatch.setattr(backward, "tokens_drawn", remembering)
    skeleton, found = told(tmp_path, windows, 1000, tmp_path / "kept", at_once=1000)

    arch = skeleton.architecture
    gradients = {}

    def keep(full):
        def hook(linear, arguments, output):
            output.retain_grad()
            gradients[full] = output

        return hook

    for linear in arch.linears:
        full = f"{arch.block_name(0)}.{linear}"
        model.get_submodule(full).register_forward_hook(keep(full))
    logits = model(batches[0].ids, use_cache=False).logits.flatten(0, 1)
    torch.nn.functional.cross_entropy(logits, torch.cat(labels).squeeze(1), reduction="sum").backward()

    size = dimensions_of(skeleton.config).head_dim
    energies = []
    for linear in arch.linears:
        full = f"{arch.block_name(0)}.{linear}"
        rows = gradients[full].grad.flatten(0, 1)
        torch.testing.assert_close(found.sensitivities(full), rows.square().mean(0), rtol=1e-3, atol=1e-7)
        if linear in arch.groups[0].linears:
            heads = rows.reshape(len(rows), -1, size)
            for half, part in enumerate(heads.chunk(2)):  # each of the two windows is a half of the text
                expected = torch.einsum("thi,thj->hij", part, part) / len(part)
                torch.testing.assert_close(found.moments(full)[half], expected, rtol=1e-3, atol=1e-7)
            energies.append(rows.square().sum(1) / rows.square().sum(1).mean())
    weights = found.token_weights(0, 0, batches[0]).flatten()
    torch.testing.assert_close(weights, 1 - SHARE + SHARE * torch.stack(energies).mean(0), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("padded", [False, True], ids=["packed", "padded"])
def test_weights_have_mean_one_though_gradients_are_of_a_part(padded, tmp_path):
    random_model("llama", tmp_path)
    windows = random_windows(count=48, padded=padded)

    skeleton, found = told(tmp_path, windows, windows.ids.numel() // 4, tmp_path / "kept")

    batches = windows.batches(100)
    for block in range(skeleton.block_count):
        weights = [
            found.token_weights(block, start, batch) for start, batch in zip(starts_of(batches), batches, strict=True)
        ]
        every = torch.cat([each.flatten() for each in weights])
        real = every if windows.mask is None else every[windows.mask.flatten().bool()]
        assert real.mean() == pytest.approx(1, rel=1e-4)
        assert every.min() == pytest.approx(1 - SHARE) and every.max() > 1
        assert sum(bool((each > 1 - SHARE).any()) for each in torch.cat(weights)) == 12


@pytest.mark.parametrize(("count", "at_once"), [(1, 64), (2, 1000), (8, 1000), (8, 1)])
def test_both_halves_of_the_text_are_known_however_it_is_cut(count, at_once, tmp_path):
    random_model("llama", tmp_path)

    skeleton, found = told(tmp_path, random_windows(count=count), 10**6, tmp_path / "kept", at_once)

    for name in skeleton.linear_shapes():
        if name.endswith(("q_proj", "k_proj", "v_proj")):
            first, second = found.moments(name)
            assert first.any() and second.any() and not torch.equal(first, second)
            whole = ((first + second) / 2).diagonal(dim1=1, dim2=2).flatten()
            if len(whole) == len(found.sensitivities(name)):
                torch.testing.assert_close(whole, found.sensitivities(name), rtol=1e-4, atol=1e-9)


def test_a_killed_run_reads_what_it_had_found(tmp_path, monkeypatch):
    random_model("llama", tmp_path)
    windows = random_windows(count=4)
    _, first = told(tmp_path, windows, 100, tmp_path / "kept")
    batch = windows.batches(10**6)[0]
    before = first.token_weights(0, 0, batch)
    monkeypatch.setattr(outputs, "walk_backward", None)

    _, again = told(tmp_path, windows, 100, tmp_path / "kept")

    assert torch.equal(again.token_weights(0, 0, batch), before)


def test_linears_with_integer_inputs_and_a_rounded_cache_have_gradients(tmp_path):
    """As if their values were plain weights; what comes into a block is what integers make of it."""
    random_model("llama", tmp_path / "model")
    stage = RoundToNearest(bits=8, group_size="channel", inputs="int8", ignore=("*self_attn*",))
    apply_stage(stage, tmp_path / "model", tmp_path / "integers", random_windows())

    skeleton, found = told(tmp_path / "integers", random_windows(count=2), 100, tmp_path / "kept")

    for name in skeleton.linear_shapes():
        assert (found.sensitivities(name) > 0).any()
    keys = torch.tensor([[[[1e-5, 300.0]]]], requires_grad=True)
    rounded(keys, torch.tensor([0.01])).backward(torch.tensor([[[[1e-6, 1.0]]]]))
    assert torch.equal(keys.grad, torch.tensor([[[[1e-6, 1.0]]]]))


def test_windows_are_spread_over_the_text_and_one_of_them_judges_refinements():
    assert evenly(16, 100, 400) == [2, 6, 10, 14]
    assert evenly(64, 2048, 8192) == [8, 24, 40, 59]
    assert evenly(64, 4096, 8192) == [16, 59]
    assert evenly(16, 100, 1) == [8]
    assert evenly(16, 100, 10**9) == list(range(16))
    assert evenly(1, 100, 10**9) == [0]


def test_what_is_too_large_to_know_is_left_out(monkeypatch):
    """8 tokens a row, and half a GiB of sums: heads always, then what is added to the residual stream."""
    arch = architecture_of({"model_type": "llama"})
    shapes = dict.fromkeys(arch.linears, (512, 512))
    shapes |= dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), (2048, 512))
    heads = {f"self_attn.{name}_proj": (8, 64) for name in "qkv"}
    added = {"self_attn.o_proj": (1, 512), "mlp.down_proj": (1, 512)}

    assert moment_shapes(arch, shapes, 4, 64, 4095) == heads
    assert moment_shapes(arch, shapes, 4, 64, 4096) == heads | added
    assert moment_shapes(arch, shapes, 4, 64, 16384) == heads | added, "gate and up would be 512 MiB more"
    assert moment_shapes(arch, shapes, 3, 64, 16384).keys() == shapes.keys()
    monkeypatch.setattr(outputs, "SUMS_BYTES", 4 * 2 * 512**2 * 8)
    assert moment_shapes(arch, shapes, 4, 64, 4096) == heads | {"self_attn.o_proj": (1, 512)}


def test_products_in_bfloat16_are_those_of_the_head_too(tmp_path, monkeypatch):
    random_model("llama", tmp_path)
    windows, checkpoint, heads = random_windows(count=8), Checkpoint(tmp_path), []
    plain = backward._loss_gradient
    monkeypatch.setattr(backward, "_loss_gradient", lambda head, *more: (heads.append(head), plain(head, *more))[1])
    told = {}
    for products in (torch.float32, torch.bfloat16):
        skeleton = Skeleton(checkpoint.config, CPU, torch.float32)
        folder = tmp_path / str(products)
        told[products] = outputs_of(skeleton, checkpoint, windows, 10**6, 1000, 3, Quiet(), folder, products)

    assert [head.weight.dtype for head in heads] == [torch.float32, torch.bfloat16]
    name = f"{skeleton.architecture.block_name(0)}.self_attn.v_proj"
    one, other = (each.sensitivities(name) for each in told.values())
    assert not torch.equal(one, other)
    torch.testing.assert_close(one.sum(), other.sum(), rtol=0.3, atol=0)
