"""Every architecture: the walk computes what transformers computes, and what is exported loads without our code."""

from __future__ import annotations

import pytest
import torch

from compress.architecture import architecture_of, dimensions_of, known_model_types
from compress.checkpoints.export import export, stored_dtype
from compress.checkpoints.formats import FORMATS
from compress.checkpoints.reader import Checkpoint
from compress.errors import RecipeError
from compress.stages import Gptq
from tests.tiny import (
    CONFIGS,
    apply_stage,
    config_of,
    load_publicly,
    our_logits,
    random_model,
    random_windows,
    their_logits,
)

ARCHITECTURES = tuple(CONFIGS)


def test_every_known_architecture_is_tested_here():
    assert set(ARCHITECTURES) == set(known_model_types())


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_walk_computes_what_transformers_computes(name, padded, tmp_path):
    model = random_model(name, tmp_path / "model")
    windows = random_windows(padded=padded)

    ours, theirs = our_logits(tmp_path / "model", windows), their_logits(model, windows)

    keep = slice(None) if windows.mask is None else windows.mask.bool()
    assert theirs[keep].std() > 0.1, "the model must say something for the comparison to mean anything"
    torch.testing.assert_close(ours[keep], theirs[keep], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["gemma2"])
def test_attention_soft_caps_are_not_lost(name, tmp_path):
    """The fused attention kernel has no soft cap; the model as published has, and so have serving runtimes."""
    from transformers import AutoModelForCausalLM

    random_model(name, tmp_path / "model")
    windows = random_windows()
    eager = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32, attn_implementation="eager")

    torch.testing.assert_close(our_logits(tmp_path / "model", windows), their_logits(eager.eval(), windows))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_quantised_export_loads_in_transformers_with_our_own_logits(name, tmp_path):
    random_model(name, tmp_path / "model")
    source = Checkpoint(tmp_path / "model")
    windows = random_windows(count=12)
    format_name = "plain" if source.architecture.transposed_linears else "compressed-tensors"
    dtype = stored_dtype(source.config, "auto", source.architecture.float16_safe)

    checkpoint, outcome = apply_stage(
        Gptq(bits=4, group_size=32), tmp_path / "model", tmp_path / "stage", windows, stored=dtype
    )
    export(checkpoint, tmp_path / "export", format_name, dtype, 10**9)

    assert {record["name"] for record in outcome.modules} == set(checkpoint.schemes)
    loaded = load_publicly(tmp_path / "export")
    held_out = random_windows(seed=8)
    ours = our_logits(tmp_path / "export", held_out)
    torch.testing.assert_close(ours, their_logits(loaded, held_out), atol=2e-5, rtol=1e-4)
    assert not torch.allclose(ours, our_logits(tmp_path / "model", held_out), atol=1e-3), "nothing was quantised"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_fused_linears_and_couplings_name_modules_that_exist(name):
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    config = config_of(name)
    architecture = architecture_of(config)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    block = model.get_submodule(architecture.block_name(0))

    for fused in architecture.fused:
        assert set(fused) <= set(architecture.linears)
    for coupling in architecture.couplings:
        for module in (coupling.writer, *coupling.readers):
            assert block.get_submodule(module).weight is not None
    matrices = {name for name, module in block.named_modules() if getattr(module, "weight", torch.empty(0)).dim() == 2}
    assert matrices == set(architecture.linears), "a linear nobody compresses"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_dimensions_give_the_bytes_of_a_real_cache(name, tmp_path):
    from transformers import DynamicCache

    from compress.memory.predict import kv_cache_bytes

    model = random_model(name, tmp_path / "model")
    tokens = 20
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.ones(1, tokens, dtype=torch.int64), past_key_values=cache, use_cache=True)
    measured = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)

    dimensions = dimensions_of(model.config)
    predicted = kv_cache_bytes(dimensions, tokens, 1, 4)
    # transformers keeps one token less than the window in a sliding layer: the next one completes it.
    spared = dimensions.sliding_blocks * 2 * dimensions.kv_heads * dimensions.head_dim * 4
    assert measured in (predicted, predicted - spared)


def test_an_unknown_architecture_is_answered_with_what_an_entry_needs():
    with pytest.raises(RecipeError) as caught:
        architecture_of({"model_type": "qwen4"})

    message = str(caught.value)
    assert "architecture 'qwen4' is not known. Did you mean \"qwen3\"? Known: llama, mistral" in message
    assert "names its embedding, blocks, final norm and head, and the linears of a block" in message


def test_transposed_linears_have_a_format():
    assert any(format_.transposed_linears for format_ in FORMATS.values())


def test_a_block_index_is_read_from_a_tensor_name():
    llama = architecture_of({"model_type": "llama"})

    assert llama.block_index("model.layers.12.mlp.up_proj.weight") == 12
    assert llama.block_index("model.norm.weight") is None
    assert llama.block_index("model.layers_norm.weight") is None
