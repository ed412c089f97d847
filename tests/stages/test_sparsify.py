"""The sparsify stage on every architecture: zeros where they were asked for, in what is written and loads."""

from __future__ import annotations

import pytest
import torch

from compress.checkpoints.export import export
from compress.checkpoints.reader import Checkpoint
from compress.stages import Sparsify
from tests.tiny import CONFIGS, apply_stage, load_publicly, our_logits, random_model, random_windows, their_logits


@pytest.mark.parametrize("name", CONFIGS)
def test_zeros_are_where_they_were_asked_for(name, tmp_path):
    random_model(name, tmp_path / "source")
    windows = random_windows(40, padded=True)

    done, outcome = apply_stage(Sparsify(pattern="2:4"), tmp_path / "source", tmp_path / "stage", windows)

    arch = done.architecture
    for index in range(2):
        for leaf in arch.linears:
            weight = done.matrix(f"{arch.block_name(index)}.{leaf}")
            assert bool(((weight.reshape(len(weight), -1, 4) == 0).sum(-1) >= 2).all()), leaf
    assert outcome.facts["share_of_zeros"] == pytest.approx(0.5, abs=0.01)
    export(done, tmp_path / "model", "plain", torch.float32, 10**9)
    few = random_windows(3)
    torch.testing.assert_close(
        their_logits(load_publicly(tmp_path / "model"), few), our_logits(done.folder, few), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(("method", "events"), [("sparsegpt", ["few_calibration_tokens"]), ("wanda", [])])
def test_fewer_tokens_than_columns_are_told_where_h_is_factorised(method, events, tmp_path):
    random_model("llama", tmp_path / "source")

    _, outcome = apply_stage(Sparsify(method=method), tmp_path / "source", tmp_path / "stage", random_windows(2))

    assert [event.kind for event in outcome.events] == events


def test_ignored_linears_and_everything_else_stay_as_they_are(tmp_path):
    random_model("llama", tmp_path / "source")
    stage = Sparsify(ratio=0.3, ignore=("*.down_proj", "re:.*self_attn.*"))

    done, outcome = apply_stage(stage, tmp_path / "source", tmp_path / "stage", random_windows(40))

    source = Checkpoint(tmp_path / "source")
    changed = {name for name in done.names if not torch.equal(done.read(name), source.read(name))}
    assert {name.split(".", 3)[3] for name in changed} == {"mlp.gate_proj.weight", "mlp.up_proj.weight"}
    assert outcome.facts["weights"] == 2 * 2 * 96 * 64


def test_sparsegpt_has_less_error_than_wanda(tmp_path):
    random_model("llama", tmp_path / "source")
    errors = {}
    for method in ("sparsegpt", "wanda"):
        _, outcome = apply_stage(Sparsify(method=method), tmp_path / "source", tmp_path / method, random_windows(60))
        errors[method] = outcome.facts["mean_error"]
    assert errors["sparsegpt"] < 0.8 * errors["wanda"]


def test_plan_says_what_it_is_worth(recipe, here):
    sparse = {"kind": "sparsify", "ignore": ["*.down_proj"], "pattern": "2:4"}
    ended = here("plan", recipe(stages=[sparse, {"kind": "gptq", "group_size": "channel"}]))

    assert ended.code == 0, ended.err
    assert "sparsify makes nothing smaller or faster" in ended.out
    assert "gptq after it will not keep them zero" in ended.out


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"pattern": "2:4"}, "the 341 columns of model.layers.0.mlp.down_proj do not divide into fours"),
        ({"pattern": "2:4", "ratio": 0.3}, "2:4 makes a half of the weights zero"),
        ({"ignore": ["*.q_prj"]}, "matches no linear"),
    ],
)
def test_mistakes(recipe, here, fields, sentence):
    ended = here("plan", recipe(stages=[{"kind": "sparsify", **fields}]))

    assert ended.code == 2 and sentence in ended.err, ended.err
