"""What judging takes: nothing of what making took."""

from __future__ import annotations

import shutil

import pytest
import torch

from compress.checkpoints.formats import FORMATS
from compress.events import Quiet
from compress.memory import predict
from compress.recipe import load_recipe
from compress.steps.plan import make_plan, plan_evaluation
from compress.steps.quantised_alone import _like_the_recipes, best_within
from compress.steps.shapes import Shape
from tests.helpers import changed, write_recipe
from tests.tiny import random_model

WIDE = {"hidden_size": 256, "intermediate_size": 512, "max_position_embeddings": 256, "vocab_size": 1024}
BIASES = {"attention_bias": False, "mlp_bias": False}


def test_judging_a_model_is_planned_without_the_text_it_was_made_with(glass_recipe, tmp_path):
    found = {}
    for own in (0, 4096):
        calibration = {**glass_recipe["calibration"], "self_generated_windows": own}
        path = write_recipe(tmp_path / f"{own}.yaml", changed(glass_recipe, calibration=calibration))
        recipe = load_recipe(path)
        found[own] = plan_evaluation(recipe, recipe.model, Quiet()).peak_host_bytes
        found[f"run {own}"] = make_plan(recipe, None, Quiet()).peak_host_bytes
    assert found[0] == found[4096]
    assert found["run 0"] < found["run 4096"]


def test_judging_on_the_calibration_text_is_warned_of(glass_recipe, tmp_path):
    recipe = changed(glass_recipe, calibration={**glass_recipe["calibration"], "data": "python-docstrings"})
    recipe["evaluation"] = [{"kind": "divergence", "data": "python-docstrings", "windows": 4, "window_tokens": 128}]
    recipe["gates"] = [{"kind": "threshold", "measure": "divergence.python-docstrings.mean_kl", "max": 0.5}]

    warned = {}
    for data in ("python-docstrings", "python-help"):
        recipe["calibration"]["data"] = data
        plan = make_plan(load_recipe(write_recipe(tmp_path / f"{data}.yaml", recipe)), None, Quiet())
        warned[data] = [warning for warning in plan.warnings if "it is the calibration text too" in warning]

    assert warned["python-docstrings"][0].startswith("set python-docstrings:") and not warned["python-help"]


@pytest.mark.parametrize(
    ("name", "blocks", "layers", "warned"),
    [
        ("llama", 5, {}, False),
        ("smollm3", 5, {"no_rope_layers": [1, 1, 1, 0, 1]}, True),
        ("smollm3", 7, {"no_rope_layers": [1, 1, 1, 0, 1, 1, 1]}, True),
    ],
)
def test_plan_warns_where_blocks_that_go_decide_what_gguf_holds(
    glass, glass_recipe, tmp_path, name, blocks, layers, warned
):
    """Without rope in every fourth layer: the first three fit llama.cpp, the last of five do not; of seven they do, and
    those from the second on do not."""
    sizes = {**BIASES, "num_hidden_layers": blocks, "max_position_embeddings": 256}
    random_model(name, tmp_path / "model", torch.float16, **layers, **sizes)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(glass / file, tmp_path / "model" / file)
    recipe = changed(
        glass_recipe,
        model={"path": str(tmp_path / "model")},
        stages=[{"kind": "structured_prune", "blocks": 3, "compare": False}],
        export={"format": "gguf", "context": 32},
    )

    plan = make_plan(load_recipe(write_recipe(tmp_path / "recipe.yaml", recipe)), None, Quiet())

    assert any("not every choice fits the format" in each for each in plan.warnings) == warned


def test_quantising_alone_is_compared_with_everything_that_gguf_holds(glass, glass_recipe, tmp_path):
    """Bytes between schemes: each limit is filled with the best that fits, K-quants and free minima among them."""
    random_model("llama", tmp_path / "model", torch.float16, **WIDE, **BIASES)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(glass / name, tmp_path / "model" / name)
    stages = [{"kind": "round_to_nearest", "bits": 4, "group_size": 32}]
    export = {"format": "gguf", "context": 32}
    recipe = changed(glass_recipe, model={"path": str(tmp_path / "model")}, stages=stages, export=export)
    plan = make_plan(load_recipe(write_recipe(tmp_path / "recipe.yaml", recipe)), None, Quiet())
    shape = Shape(plan.config)
    found = {}
    for bits in (2.7, 3.5, 4.55, 5.1, 6.6):
        quantised = sum(rows * columns for rows, columns in shape.matrices.values())
        whole = predict.stored_bytes(shape.tensors, shape.everything, {}, 2, FORMATS["gguf"])
        best = best_within(plan, int(whole - quantised * (16 - bits) / 8))
        assert best is not None and best.bytes <= whole
        found[bits] = best.scheme.label
        stage = _like_the_recipes(plan, best)
        assert set(stage.schemes(shape.matrices).values()) == {best.scheme}
    assert [label.split(" (")[0] for label in found.values()] == [
        "Q2_K",
        "Q3_K",
        "Q4_K",
        "int4 asymmetric group 32, free minima",
        "Q6_K",
    ]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"bits": 3}, "gguf keeps int3 symmetric group 32 as Q4_0, in as many bytes as 4 bits; k_quant: true does not"),
        ({"bits": 6}, "gguf keeps int6 symmetric group 32 as Q8_0, in as many bytes as 8 bits; k_quant: true does not"),
        ({"bits": 4, "symmetric": False}, "zero_points: free is less error in the same bytes"),
        ({"bits": 4, "symmetric": False, "zero_points": "free"}, ""),
        ({"bits": 4}, ""),
    ],
)
def test_plan_says_what_gguf_makes_of_a_scheme(glass_recipe, tmp_path, fields, said):
    stages = [{"kind": "round_to_nearest", "group_size": 32, "ignore": ["*.down_proj"], **fields}]
    recipe = changed(glass_recipe, stages=stages, export={"format": "gguf", "context": 32})

    plan = make_plan(load_recipe(write_recipe(tmp_path / "recipe.yaml", recipe)), None, Quiet())

    found = [warning for warning in plan.warnings if "gguf keeps" in warning]
    assert len(found) == bool(said) and all(said in warning for warning in found)
