"""Opening a source: one that was quantised before is its values, for stages and for what they leave alone."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from compress.checkpoints.export import export
from compress.checkpoints.reader import Checkpoint
from compress.checkpoints.sources import ModelSpec
from compress.errors import UnhealthySourceError
from compress.events import Quiet
from compress.stages import BitsAndBytesStage, RoundToNearest, Vocabulary
from compress.steps.source import open_source
from tests.helpers import run_cli
from tests.tiny import apply_stage

NARROW = ("*.mlp.*",)
"""glass has MLPs of 341 channels, which not every format holds."""
MADE = {
    "compressed-tensors": RoundToNearest(bits=4, group_size=32, ignore=NARROW),
    "gptq": RoundToNearest(bits=4, group_size=32, symmetric=False, ignore=NARROW),
    "bitsandbytes": BitsAndBytesStage(ignore=NARROW),
}


@pytest.fixture(params=sorted(MADE))
def quantised(request, glass, tmp_path):
    """A folder as another tool would leave it."""
    done, _ = apply_stage(MADE[request.param], glass, tmp_path / "stage")
    folder = tmp_path / "quantised"
    export(done, folder, request.param, torch.float16, 10**9)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (glass / name).is_file():
            shutil.copyfile(glass / name, folder / name)
    return folder


def test_a_quantised_folder_is_opened_as_its_values(quantised, tmp_path, monkeypatch):
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))
    opened = open_source(ModelSpec(path=quantised, device="cpu"), Quiet())

    packed, plain = Checkpoint(quantised), opened.checkpoint
    assert len(packed.schemes) == 16 and not plain.schemes and "quantization_config" not in plain.config
    for module in packed.schemes:
        assert torch.equal(plain.read(f"{module}.weight"), packed.dense(module).to(torch.float16))
    assert [event.kind for event in opened.events] == ["source_was_quantized"]
    assert "x16" in opened.events[0].message


def test_a_damaged_one_is_told_by_the_name_that_the_recipe_gives_it(quantised, tmp_path, monkeypatch):
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))
    tensors = load_file(quantised / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].clone()
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, quantised / "model.safetensors", {"format": "pt"})

    with pytest.raises(UnhealthySourceError, match=f"^{quantised}: NaN or infinite weights in model.norm.weight"):
        open_source(ModelSpec(path=quantised, device="cpu"), Quiet())


@pytest.mark.parametrize(
    ("tied", "head", "said"),
    [(False, None, "lm_head.weight is missing.*does not tie"), (True, 1.0, "ties the head to the embedding, and lm_")],
)
def test_a_head_that_the_config_does_not_explain_is_no_healthy_source(glass, tmp_path, tied, head, said):
    folder = tmp_path / "model"
    shutil.copytree(glass, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": tied}))
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("lm_head.weight", None)
    if head is not None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + head
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    with pytest.raises(UnhealthySourceError, match=said):
        open_source(ModelSpec(path=folder, device="cpu"), Quiet())


def test_a_head_quantised_by_itself_is_untied_in_the_values(glass, tmp_path, monkeypatch):
    """A release whose config still ties it to the embedding, as the source's did."""
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))
    plain = tmp_path / "plain"
    shutil.copytree(glass, plain)
    config = {**json.loads((plain / "config.json").read_text()), "tie_word_embeddings": False}
    (plain / "config.json").write_text(json.dumps(config))
    tensors = load_file(plain / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, plain / "model.safetensors", {"format": "pt"})
    done, _ = apply_stage(Vocabulary(parts="head", bits=8, group_size=32), plain, tmp_path / "stage")
    folder = tmp_path / "quantised"
    export(done, folder, "compressed-tensors", torch.float16, 10**9)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(glass / name, folder / name)
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**written, "tie_word_embeddings": True}))

    opened = open_source(ModelSpec(path=folder, device="cpu"), Quiet())

    assert opened.checkpoint.config["tie_word_embeddings"] is False and not opened.checkpoint.tied_head


def test_what_a_stage_leaves_alone_keeps_its_values_in_the_export(quantised, tmp_path, monkeypatch):
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))
    text = {"data": "python-docstrings", "windows": 4, "window_tokens": 128}
    recipe = {
        "schema": 1,
        "name": "again",
        "model": {"path": str(quantised)},
        "stages": [{"kind": "round_to_nearest", "bits": 8, "group_size": 32, "ignore": ["*.o_proj", "*.down_proj"]}],
        "evaluation": [{"kind": "divergence", **text}],
        "gates": [{"kind": "threshold", "measure": "divergence.python-docstrings.mean_kl", "max": 0.01}],
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))

    planned = run_cli("plan", path, "--json")
    ended = run_cli("run", path, "--store", tmp_path / "store", "--json")

    assert any("were quantised before" in each for each in json.loads(planned.out)["warnings"])
    assert ended.code == 0, ended.err
    report = json.loads(ended.out)
    assert report["event_counts"] == {"module_kept": 8, "source_was_quantized": 1}
    stored = report["measurements"]["compressed"]["weight_bytes"]
    assert stored == json.loads(planned.out)["stored_bytes"]
