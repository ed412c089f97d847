"""Targets in numbers of pieces, and the config of the result, against models that transformers builds."""

from __future__ import annotations

import pytest
import torch

from compress.architecture import dimensions_of
from compress.checkpoints.skeleton import Skeleton
from compress.errors import RecipeError
from compress.pruning.counts import Counts, Model, Target, counts_for, multiple_for, pruned_config
from tests.tiny import CONFIGS, CPU, config_of

SMOLLM2 = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}


def model_of(config):
    skeleton = Skeleton(config, CPU, torch.float32)
    return Model.of(config, dimensions_of(skeleton.config), skeleton.parameter_shapes()), skeleton


def found(target, parts, **explicit):
    model, _ = model_of(SMOLLM2)
    counts = Counts(**{"blocks": 30, "kv_heads": 3, "channels": 1536, **explicit})
    return counts_for(model, Target(**target), parts, counts, multiple_for(1536, None), 2)


def test_the_example_of_the_docstring():
    model, _ = model_of(SMOLLM2)

    assert model.block == 3_540_096 and model.per_piece["mlp"] == 1_728
    assert found({"ratio": 0.125}, ["mlp"]) == Counts(30, 3, 1280)


@pytest.mark.parametrize("ratio", [0.05, 0.125, 0.25, 0.4, 0.6])
@pytest.mark.parametrize("parts", [["mlp"], ["depth"], ["depth", "mlp"], ["heads", "mlp"], ["depth", "heads", "mlp"]])
def test_targets_are_met_and_not_by_much(ratio, parts):
    model, _ = model_of(SMOLLM2)
    whole = model.block_parameters(model.counts)

    reached = 1 - model.block_parameters(found({"ratio": ratio}, parts)) / whole

    # One block is 1/30, 128 channels of all blocks 1/16.
    assert ratio - 0.005 <= reached < ratio + (0.07 if "mlp" in parts else 0.035)


def test_parameters_and_bytes_say_the_same_as_a_ratio():
    model, _ = model_of(SMOLLM2)
    counts = found({"ratio": 0.25}, ["mlp"])
    parameters = model.parameters(counts)

    assert found({"parameters": parameters}, ["mlp"]) == counts
    assert found({"weight_bytes": 2 * parameters}, ["mlp"]) == counts
    assert found({"weight_bytes": 2 * parameters - 2}, ["mlp"]).channels == counts.channels - 128
    assert found({"ratio": 0.25}, ["mlp"], blocks=20) == Counts(20, 3, 1536)


LLAMA_8B = {
    **SMOLLM2,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}


@pytest.mark.parametrize("ratio", [0.05, 0.1, 0.25, 0.4, 0.6])
@pytest.mark.parametrize("parts", [["heads", "mlp"], ["depth", "heads"], ["depth", "heads", "mlp"], ["depth", "mlp"]])
def test_heads_are_those_that_the_config_takes_and_targets_are_met(ratio, parts):
    """32 query heads over 8 KV heads: only 1, 2, 4 and 8 KV heads leave query heads that divide 4,096."""
    model, _ = model_of(LLAMA_8B)
    assert model.head_counts == (1, 2, 4, 8)
    whole = model.block_parameters(model.counts)
    counts = counts_for(model, Target(ratio=ratio), parts, model.counts, 128, 2)

    assert counts.kv_heads in model.head_counts
    reached = 1 - model.block_parameters(counts) / whole
    assert ratio - 0.005 <= reached < ratio + (0.01 if "mlp" in parts else 0.035)
    if "depth" in parts and ratio >= 0.1:
        assert counts.blocks < 32


def test_a_ratio_that_leaves_nothing_names_the_smallest():
    with pytest.raises(RecipeError, match=r"taking from heads leaves at least .* \(a ratio of 0.167\)"):
        found({"ratio": 0.5}, ["heads"])


@pytest.mark.parametrize("given", [{}, {"ratio": 0.1, "parameters": 5}])
def test_a_target_has_exactly_one_field(given):
    with pytest.raises(ValueError, match="exactly one of"):
        Target(**given)


@pytest.mark.parametrize(("width", "multiple"), [(14336, 128), (1536, 128), (341, 32), (96, 8), (9, 1), (4, 1)])
def test_multiples_leave_eight_steps(width, multiple):
    assert multiple_for(width, None) == multiple
    assert multiple_for(width, 7) == 7


@pytest.mark.parametrize("name", CONFIGS)
def test_counted_parameters_are_those_of_the_model_that_the_config_describes(name):
    """The prediction of `plan`, for every architecture and kind of piece."""
    config = config_of(name).to_dict()
    model, skeleton = model_of(config)
    now = model.counts
    fewer = Counts(1, 1 if "heads" in model.kinds else now.kv_heads, 64)

    changed = pruned_config(config, skeleton.config, skeleton.architecture, model.dimensions, fewer, [1])

    after, pruned = model_of(changed)
    assert after.counts == fewer
    assert after.block_parameters(fewer) == model.block_parameters(fewer)
    assert after.parameters(fewer) == sum(parameter.numel() for parameter in _stored(pruned))
    lists = {"layer_types": ["full_attention"], "no_rope_layers": [0]}
    for key, wanted in lists.items():
        if CONFIGS[name].get(key):
            assert getattr(pruned.config, key) == wanted


def _stored(skeleton):
    names = skeleton.parameter_shapes()
    return [parameter for name, parameter in skeleton.model.named_parameters() if name in names]


@pytest.mark.parametrize(("name", "possible"), [("llama", (1, 2, 4)), ("gemma2", (1, 2, 4)), ("qwen3", (1, 2, 3, 4))])
def test_only_counts_of_heads_that_transformers_takes(name, possible):
    """Some types refuse a config whose query heads do not divide the hidden width; found by asking transformers."""
    config = config_of(name, num_attention_heads=8, num_key_value_heads=4, head_dim=16).to_dict()

    assert model_of(config)[0].head_counts == possible
