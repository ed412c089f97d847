"""Which module gets which scheme, and what `check` finds before work starts."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from compress.architecture import architecture_of
from compress.checkpoints.formats.fusing import fused_that_differ
from compress.stages import RoundToNearest
from compress.stages.scheme_checks import matches

LLAMA = architecture_of({"model_type": "llama"})
SHAPES = {
    f"model.layers.{block}.{name}": (64, 172 if name == "mlp.down_proj" else 128)
    for block in range(2)
    for name in LLAMA.linears
}


@pytest.mark.parametrize(
    ("pattern", "module", "found"),
    [
        ("*.down_proj", "model.layers.0.mlp.down_proj", True),
        ("down_proj", "model.layers.0.mlp.down_proj", True),
        ("model.layers.1.*", "model.layers.11.mlp.down_proj", False),
        (r"re:model\.layers\.(0|1)\..*", "model.layers.1.mlp.up_proj", True),
        (r"re:layers", "model.layers.1.mlp.up_proj", False),
        ("*.DOWN_proj", "model.layers.0.mlp.down_proj", False),
    ],
)
def test_patterns_are_globs_or_whole_regular_expressions(pattern, module, found):
    assert matches(pattern, module) == found


def test_the_last_matching_override_wins_and_keeps_the_fields_it_leaves_out():
    stage = RoundToNearest(
        bits=4,
        group_size=32,
        overrides=({"match": "*.mlp.*", "bits": 3}, {"match": "*.down_proj", "group_size": "channel"}),
    )

    assert stage.scheme_of("model.layers.0.mlp.up_proj").label == "int3 symmetric group 32"
    assert stage.scheme_of("model.layers.0.mlp.down_proj").label == "int3 symmetric channel"
    assert stage.scheme_of("model.layers.0.self_attn.q_proj").label == "int4 symmetric group 32"


def test_a_group_size_that_does_not_divide_is_one_sentence_with_sizes_that_do():
    (sentence,) = RoundToNearest(group_size=128).check(SHAPES, LLAMA)

    assert sentence == (
        "model.layers.0.mlp.down_proj (and 1 more like it): 172 input columns do not divide into groups of 128; "
        "use group_size 43, 86, 172 or channel for down_proj (overrides), or ignore it"
    )


def test_ignoring_the_module_or_giving_it_another_size_settles_it():
    for settled in ({"ignore": ("*.down_proj",)}, {"overrides": ({"match": "*.down_proj", "group_size": 43},)}):
        assert RoundToNearest(group_size=128, **settled).check(SHAPES, LLAMA) == []


def test_parts_of_a_fused_projection_must_share_a_scheme():
    stage = RoundToNearest(group_size="channel", overrides=({"match": "*.q_proj", "bits": 8},))

    (found,) = fused_that_differ(stage.schemes(SHAPES), SHAPES, LLAMA)

    assert found.startswith("model.layers.0: q_proj int8 symmetric channel, k_proj int4 symmetric channel")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 7}, "bits"),
        ({"bits": 1}, "bits"),
        ({"group_size": 0}, "number of columns"),
        ({"group_size": -32}, "number of columns"),
        ({"group_size": "row"}, "group_size"),
        ({"ignore": ["re:("]}, "not a regular expression"),
        ({"overrides": [{"match": "*", "bitz": 3}]}, "bitz"),
        ({"overrides": [{"match": "*", "group_size": 1}]}, "number of columns"),
    ],
)
def test_values_no_kernel_knows_are_refused(fields, message):
    with pytest.raises(ValidationError, match=message):
        RoundToNearest(**fields)
