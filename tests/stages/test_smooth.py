"""Channel scaling: the function stays, what rounding costs falls."""

from __future__ import annotations

import pytest
import torch

from compress.architecture import architecture_of
from compress.checkpoints.reader import Checkpoint
from compress.stages import Awq, RoundToNearest, SmoothQuant
from tests.tiny import apply_stage, our_logits, random_model, random_windows

W8A8 = {"bits": 8, "group_size": "channel", "inputs": "int8"}


def with_outliers(name, folder, **changes):
    """A random model whose norms blow up some channels, the readers' columns making up for it."""
    from safetensors.torch import load_file, save_file

    random_model(name, folder, **changes)
    tensors = load_file(folder / "model.safetensors")
    for key, tensor in tensors.items():
        large = torch.ones(64)
        large[::8] = 30.0
        if key.endswith(("input_layernorm.weight", "post_attention_layernorm.weight")):
            tensors[key] = tensor * large
        elif key.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")):
            tensors[key] = tensor / large
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("stage", [SmoothQuant(), Awq(group_size=32)], ids=["smoothquant", "awq"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma2", "phi3"])
def test_the_function_stays_the_same(name, stage, tmp_path):
    random_model(name, tmp_path / "model")
    windows = random_windows(8)
    done, outcome = apply_stage(stage, tmp_path / "model", tmp_path / "scaled", windows)

    before, after = our_logits(tmp_path / "model", windows), our_logits(done.folder, windows)

    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-3)
    assert not done.schemes
    assert all(place["error_ratio"] <= 1 for place in outcome.facts["places"])


def test_smoothquant_takes_outliers_out_of_inputs(tmp_path):
    with_outliers("llama", tmp_path / "model")
    windows, held_out = random_windows(12), random_windows(6, seed=9)
    source = our_logits(tmp_path / "model", held_out)
    scaled, outcome = apply_stage(SmoothQuant(), tmp_path / "model", tmp_path / "scaled", windows)

    losses = []
    for number, folder in enumerate((tmp_path / "model", scaled.folder)):
        coded, _ = apply_stage(RoundToNearest(**W8A8), folder, tmp_path / f"coded{number}")
        losses.append(float((our_logits(coded.folder, held_out) - source).square().mean()))

    assert losses[1] < 0.5 * losses[0]
    norms = [place for place in outcome.facts["places"] if "layernorm" in place["writer"]]
    assert all(place["alpha"] is not None and place["error_ratio"] < 0.7 for place in norms)


def test_awq_loses_less_than_rounding_where_inputs_differ(tmp_path):
    random_model("llama", tmp_path / "model")
    from safetensors.torch import load_file, save_file

    tensors = load_file(tmp_path / "model" / "model.safetensors")
    for key, tensor in tensors.items():
        if key.endswith("layernorm.weight"):
            tensor[::8] *= 20
    save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    windows, held_out = random_windows(12), random_windows(6, seed=9)
    source = our_logits(tmp_path / "model", held_out)
    scaled, _ = apply_stage(Awq(bits=3, group_size=32), tmp_path / "model", tmp_path / "scaled", windows)

    losses = []
    for number, folder in enumerate((tmp_path / "model", scaled.folder)):
        stage = RoundToNearest(bits=3, group_size=32, scales="minmax")
        coded, _ = apply_stage(stage, folder, tmp_path / f"coded{number}")
        losses.append(float((our_logits(coded.folder, held_out) - source).square().mean()))

    assert losses[1] < 0.9 * losses[0]


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(tmp_path):
    from safetensors.torch import load_file

    random_model("llama", tmp_path / "model")
    windows = random_windows(8)
    whole, _ = apply_stage(SmoothQuant(), tmp_path / "model", tmp_path / "whole", windows)
    apply_stage(SmoothQuant(), tmp_path / "model", tmp_path / "cut", windows)
    for path in tmp_path.glob("cut/block-00001.*"):
        path.unlink()

    again, outcome = apply_stage(SmoothQuant(), tmp_path / "model", tmp_path / "cut", windows)

    for index in range(2):
        name = f"block-{index:05d}.safetensors"
        expected, found = load_file(whole.folder / name), load_file(again.folder / name)
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert {place["block"] for place in outcome.facts["places"]} == {0, 1}


def test_where_no_factor_can_be_folded_it_is_refused():
    assert "gpt2 has no place" in SmoothQuant().check({}, architecture_of({"model_type": "gpt2"}))[0]


def test_tensors_that_are_not_scaled_keep_their_bytes(tmp_path):
    random_model("llama", tmp_path / "model", torch.float16)
    done, _ = apply_stage(SmoothQuant(), tmp_path / "model", tmp_path / "scaled", random_windows(8))
    source = Checkpoint(tmp_path / "model")

    for name in ("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.bias", "model.norm.weight"):
        assert torch.equal(done.read(name), source.read(name))
