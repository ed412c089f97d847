"""Rescaling moves weights off their old grid and leaves the function alone."""

from __future__ import annotations

import json

import pytest
import torch

from compress.checkpoints.reader import Checkpoint
from compress.checkpoints.rescale import rescale
from compress.errors import RecipeError
from tests.tiny import load_publicly, our_logits, random_model, random_windows, their_logits

DEFINED = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "smollm3")


@pytest.mark.parametrize("name", DEFINED)
def test_a_rescaled_model_computes_the_same_logits(name, tmp_path):
    model = random_model(name, tmp_path / "model")
    (tmp_path / "rescaled").mkdir()
    source = Checkpoint(tmp_path / "model")
    windows = random_windows()

    rescale(source, tmp_path / "rescaled", amplitude=0.2, seed=0)

    moved = Checkpoint(tmp_path / "rescaled")
    expected = their_logits(model, windows)
    torch.testing.assert_close(our_logits(tmp_path / "rescaled", windows), expected, atol=1e-4, rtol=1e-4)
    theirs = their_logits(load_publicly(tmp_path / "rescaled"), windows)
    torch.testing.assert_close(theirs, expected, atol=1e-4, rtol=1e-4)
    for coupled in {reader for coupling in source.architecture.couplings for reader in coupling.readers}:
        before, after = (checkpoint.matrix(f"model.layers.0.{coupled}") for checkpoint in (source, moved))
        assert not torch.allclose(before, after, rtol=0.02), f"{coupled} stayed on its grid"


@pytest.mark.parametrize("name", [name for name in DEFINED if name != "phi3"])
def test_every_linear_leaves_its_grid(name, tmp_path):
    """Not Phi-3's output and down projections: what feeds them is fused with other rows."""
    random_model(name, tmp_path / "model")
    (tmp_path / "rescaled").mkdir()
    source = Checkpoint(tmp_path / "model")
    rescale(source, tmp_path / "rescaled", amplitude=0.2, seed=0)
    moved = Checkpoint(tmp_path / "rescaled")

    for linear in source.architecture.linears:
        before, after = (checkpoint.matrix(f"model.layers.0.{linear}") for checkpoint in (source, moved))
        assert not torch.allclose(before, after, rtol=0.02), f"{linear} stayed on its grid"


@pytest.mark.parametrize("seed", [0, 1])
def test_the_same_seed_gives_the_same_factors_and_another_gives_others(tmp_path, seed):
    random_model("llama", tmp_path / "model")
    digests = []
    for name, other in (("a", 0), ("b", seed)):
        (tmp_path / name).mkdir()
        rescale(Checkpoint(tmp_path / "model"), tmp_path / name, 0.2, other)
        digests.append(Checkpoint(tmp_path / name).digest())

    assert (digests[0] == digests[1]) == (seed == 0)


def test_an_architecture_without_couplings_is_refused(tmp_path):
    random_model("gpt2", tmp_path / "model")

    with pytest.raises(RecipeError, match=r"model\.rescale: not defined for architecture gpt2"):
        rescale(Checkpoint(tmp_path / "model"), tmp_path, 0.2, 0)


def test_glass_computes_the_same_logits(glass, tmp_path):
    """A trained model: fp16 weights cannot hold the factors exactly, so it is written in float32 first."""
    from safetensors.torch import load_file, save_file

    from compress.calibration.windows import Windows

    (tmp_path / "model").mkdir()
    (tmp_path / "rescaled").mkdir()
    save_file(
        {name: tensor.float() for name, tensor in load_file(glass / "model.safetensors").items()},
        tmp_path / "model" / "model.safetensors",
    )
    config = json.loads((glass / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))

    rescale(Checkpoint(tmp_path / "model"), tmp_path / "rescaled", 0.2, 0)

    windows = Windows(torch.arange(4, 260).view(2, 128), None, {})
    before, after = our_logits(tmp_path / "model", windows), our_logits(tmp_path / "rescaled", windows)
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)
