"""W8A8: rounded inputs in the Hessian, integers in the evaluation, `int-quantized` on disk, transformers as oracle."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from safetensors.torch import load_file

from compress.architecture import architecture_of
from compress.checkpoints.export import export
from compress.checkpoints.reader import Checkpoint
from compress.checkpoints.skeleton import Skeleton
from compress.evaluation.measure import walk_states
from compress.events import Quiet
from compress.quantization.scheme import Scheme
from compress.stages import Gptq, Recover, RoundToNearest
from tests.tiny import CPU, apply_stage, load_publicly, our_logits, random_model, random_windows, their_logits

W8A8 = {"bits": 8, "group_size": "channel", "inputs": "int8"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    random_model("llama", folder, torch.float16)
    return folder


def exported(stage, model, tmp_path):
    done, _ = apply_stage(stage, model, tmp_path / "stage", random_windows(12))
    export(done, tmp_path / "export", "compressed-tensors", torch.float16, 10**9)
    return done, tmp_path / "export"


def as_loaded(folder, windows):
    """Our logits, computed as transformers does."""
    checkpoint = Checkpoint(folder)
    states = walk_states(checkpoint, {"set": windows}, CPU, torch.float32, 48, Quiet(), "", as_loaded=True)["set"]
    with Skeleton(checkpoint.config, CPU, torch.float32).head(checkpoint) as head:
        return torch.stack([head.logits(window) for window in states])


@pytest.mark.parametrize("stage", [Gptq(**W8A8), RoundToNearest(**W8A8)], ids=["gptq", "rounded"])
def test_it_loads_in_transformers_with_our_logits(stage, model, tmp_path):
    done, folder = exported(stage, model, tmp_path)
    windows = random_windows(2, seed=9)
    section = json.loads((folder / "config.json").read_text())["quantization_config"]

    assert section["format"] == "int-quantized"
    assert section["config_groups"]["group_0"]["input_activations"]["strategy"] == "token"
    assert load_file(folder / "model.safetensors")["model.layers.0.mlp.up_proj.weight"].dtype == torch.int8
    assert Checkpoint(folder).schemes == done.schemes
    theirs = their_logits(load_publicly(folder), windows)
    torch.testing.assert_close(as_loaded(folder, windows), theirs, atol=1e-3, rtol=1e-3)
    # What serves it rounds inputs to a range of 127, transformers to 127.5: that is no worse than rounding at all.
    served, source = our_logits(folder, windows), our_logits(model, windows)
    assert (served - theirs).abs().mean() < 1.5 * (served - source).abs().mean()


def test_inputs_are_really_rounded(model, tmp_path):
    done, folder = exported(RoundToNearest(**W8A8), model, tmp_path)
    export(done, tmp_path / "weights", "plain", torch.float16, 10**9)
    windows = random_windows(2)

    difference = (our_logits(folder, windows) - our_logits(tmp_path / "weights", windows)).abs().max()

    assert 1e-3 < difference < 0.5


def test_the_hessian_is_that_of_rounded_inputs(model, tmp_path):
    """What GPTQ makes of the same weights differs from what it makes without rounded inputs, and over a few texts is
    no worse: 8 bits leave little to gain, and one text moves it by a tenth either way."""
    held_out = random_windows(8, seed=9)
    source = our_logits(model, held_out)
    losses = {"with": 0.0, "without": 0.0}
    asked = (("with", W8A8), ("without", {**W8A8, "inputs": "none"}))
    for (name, fields), seed in itertools.product(asked, (20, 21, 22)):
        done, _ = apply_stage(Gptq(**fields), model, tmp_path / f"{name}-{seed}", random_windows(24, seed=seed))
        # Both run on integers: the codes of the second are read as if its inputs were rounded too.
        read = Checkpoint(done.folder)
        read.schemes = dict.fromkeys(read.schemes, Scheme(8, True, None, inputs=8))
        states = walk_states(read, {"set": held_out}, CPU, torch.float32, 48, Quiet(), "")["set"]
        with Skeleton(read.config, CPU, torch.float32).head(read) as head:
            logits = torch.stack([head.logits(window) for window in states])
        losses[name] += float((logits - source).square().mean())

    assert losses["with"] < losses["without"] * 1.05
    assert losses["with"] != losses["without"]


def test_some_linears_may_keep_their_inputs(model, tmp_path):
    overrides = ({"match": "*.down_proj", "bits": 4, "group_size": 32, "inputs": "none"},)
    done, folder = exported(RoundToNearest(**W8A8, overrides=overrides), model, tmp_path)
    section = json.loads((folder / "config.json").read_text())["quantization_config"]

    assert section["format"] == "mixed-precision"
    assert {group["format"] for group in section["config_groups"].values()} == {"int-quantized", "pack-quantized"}
    assert Checkpoint(folder).schemes == done.schemes
    windows = random_windows(2)
    theirs = their_logits(load_publicly(folder), windows)
    torch.testing.assert_close(as_loaded(folder, windows), theirs, atol=1e-3, rtol=1e-3)


def test_weights_that_no_kernel_multiplies_with_integers_are_refused():
    shapes = {"model.layers.0.mlp.down_proj": (64, 96)}

    mistakes = Gptq(bits=4, group_size=32, inputs="int8").check(shapes, architecture_of({"model_type": "llama"}))

    assert any("int8 inputs go with bits: 8, symmetric: true, group_size: channel" in mistake for mistake in mistakes)


def test_recover_trains_scales_under_rounded_inputs(model, tmp_path):
    done, _ = apply_stage(RoundToNearest(**W8A8), model, tmp_path / "coded")
    stage = Recover(epochs=2)
    trained, outcome = apply_stage(stage, done.folder, tmp_path / "trained", random_windows(16), origin=model)

    assert trained.schemes == done.schemes
    assert outcome.facts["held_out_kl_after"] <= outcome.facts["held_out_kl_before"]


def test_every_linear_runs_on_integers_from_the_moment_it_is_solved(model, tmp_path, monkeypatch):
    """The walk is held inside a linear's own call: that linear too must go on with integers."""
    from compress.quantization.inputs import IntegerLinear

    shapes: dict[tuple[int, ...], int] = {}
    inner = IntegerLinear.__call__

    def counted(self, inputs, bias):
        shapes[tuple(self.codes.shape)] = shapes.get(tuple(self.codes.shape), 0) + 1
        return inner(self, inputs, bias)

    monkeypatch.setattr(IntegerLinear, "__call__", counted)
    apply_stage(Gptq(**W8A8), model, tmp_path / "stage", random_windows(12))

    # Two blocks, a call for each of 12 batches: q and o are 64 x 64, k and v 32 x 64, gate and up 96 x 64.
    assert shapes == {(64, 64): 2 * 2 * 12, (32, 64): 2 * 2 * 12, (96, 64): 2 * 2 * 12, (64, 96): 2 * 12}


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(model, tmp_path):
    windows = random_windows(12)
    for folder in ("whole", "cut"):
        apply_stage(Gptq(**W8A8), model, tmp_path / folder, windows)
    for path in tmp_path.glob("cut/block-00001.*"):
        path.unlink()

    apply_stage(Gptq(**W8A8), model, tmp_path / "cut", windows)

    for index in range(2):
        name = f"block-{index:05d}.safetensors"
        expected, found = load_file(tmp_path / "whole" / name), load_file(tmp_path / "cut" / name)
        assert all(torch.equal(found[key], expected[key]) for key in expected), name
