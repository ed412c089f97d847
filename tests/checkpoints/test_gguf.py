"""GGUF, against two readers: the gguf package's, and transformers'. `make loaders` runs llama.cpp itself."""

from __future__ import annotations

import json

import gguf
import numpy as np
import pytest
import torch

from compress.architecture import architecture_of
from compress.checkpoints.export import export
from compress.checkpoints.formats import FORMATS
from compress.checkpoints.formats.gguf import effective_bits, type_of
from compress.checkpoints.formats.gguf_names import rope_factors, unsupported
from compress.checkpoints.formats.gguf_tokenizer import vocabulary_of
from compress.checkpoints.from_gguf import convert
from compress.quantization.grid import dequantize
from compress.quantization.scheme import Scheme
from compress.stages import RoundToNearest
from tests.tiny import apply_stage, config_of, our_logits, random_model, random_windows

SCHEMES = {
    "Q4_0": [{"bits": 4}, {"bits": 3}, {"bits": 2}],
    "Q4_1": [{"bits": 4, "symmetric": False}, {"bits": 3, "symmetric": False}],
    "Q5_0": [{"bits": 5}],
    "Q5_1": [{"bits": 5, "symmetric": False}],
    "Q8_0": [{"bits": 6}, {"bits": 8}],
}
CASES = [(kind, fields) for kind, several in SCHEMES.items() for fields in several]


def exported(tmp_path, fields, name="llama", **changes):
    changes = {"attention_bias": False, "mlp_bias": False, "sliding_window": None, **changes}
    random_model(name, tmp_path / "model", torch.float16, **changes)
    done, _ = apply_stage(RoundToNearest(**{"group_size": 32, **fields}), tmp_path / "model", tmp_path / "stage")
    written = export(done, tmp_path / "export" / "model", "gguf", torch.float16, 10**9)
    (tmp_path / "export" / "recipe.yaml").write_text("")
    return done, tmp_path / "export" / "model" / "model.gguf", written


def tensors_of(path):
    return {tensor.name: tensor for tensor in gguf.GGUFReader(str(path)).tensors}


@pytest.mark.parametrize(("kind", "fields"), CASES, ids=[f"{kind}-{fields['bits']}" for kind, fields in CASES])
@pytest.mark.parametrize("group", [32, "channel"])
def test_the_packages_reader_gives_our_values(tmp_path, kind, fields, group):
    done, path, _ = exported(tmp_path, {**fields, "group_size": group})
    tensor = tensors_of(path)["blk.1.ffn_down.weight"]

    values = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type))

    assert tensor.tensor_type.name == kind
    codes, grid = done.codes("model.layers.1.mlp.down_proj")
    ours = dequantize(codes, grid).float()
    if grid.zero is None:
        # The product of code and scale is exact in float32; ours is rounded to float16.
        assert torch.equal(values.half().float(), ours)
    else:
        # The minimum was rounded to float16: half a unit in its last place.
        bound = (grid.zero.float() * grid.scale.float()).abs().max() * 2**-10 + ours.abs().max() * 2**-10
        assert (values - ours).abs().max() < bound


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3"])
def test_transformers_reads_it_with_our_logits(tmp_path, name):
    changes = {"use_sliding_window": False, "layer_types": ["full_attention"] * 2} if name == "qwen2" else {}
    done, path, written = exported(tmp_path, {"bits": 4}, name, **changes)
    (tmp_path / "read").mkdir()
    previous = convert(path, tmp_path / "read", path.parent)
    windows = random_windows(count=2)

    ours, theirs = our_logits(done.folder, windows), our_logits(tmp_path / "read", windows)

    assert "Q4_0 x14" in previous
    assert written.bytes == sum(int(tensor.n_bytes) for tensor in tensors_of(path).values())
    # Products of code and scale are float16 here, float32 there.
    torch.testing.assert_close(theirs, ours, atol=1e-2, rtol=1e-2)
    assert ours.std() > 0.1


def test_biases_of_llamas_queries_are_reordered_with_their_rows(tmp_path):
    done, path, _ = exported(tmp_path, {"bits": 8}, attention_bias=True)
    found = tensors_of(path)["blk.0.attn_q.bias"].data
    ours = done.read("model.layers.0.self_attn.q_proj.bias").numpy()

    # Four heads of 16: rows 0 and 8 of a head become neighbours.
    assert found.dtype == np.float32
    assert np.array_equal(found[:4], ours[[0, 8, 1, 9]])


def test_bytes_and_bits_are_what_the_format_predicts(tmp_path):
    done, path, written = exported(tmp_path, {"bits": 4})
    format_ = FORMATS["gguf"]
    linears = sum(format_.stored_bytes(scheme, *done.matrix_shape(name), 2) for name, scheme in done.schemes.items())
    others = [done.header(name)[1] for name in done.names if done.quantised_owner(name) is None]

    assert written.bytes == linears + sum(format_.other_bytes(tuple(shape), 2) for shape in others)
    assert effective_bits(path) == 4.5


def test_a_mixture_keeps_a_type_for_each_linear(tmp_path):
    fields = {"bits": 4, "overrides": ({"match": "*.down_proj", "bits": 8},), "ignore": ("*.o_proj",)}
    _, path, _ = exported(tmp_path, fields)
    kinds = {name: tensor.tensor_type.name for name, tensor in tensors_of(path).items()}

    assert kinds["blk.0.ffn_down.weight"] == "Q8_0" and kinds["blk.0.ffn_up.weight"] == "Q4_0"
    assert kinds["blk.0.attn_output.weight"] == "F16" and kinds["blk.0.attn_norm.weight"] == "F32"


@pytest.mark.parametrize(
    ("scheme", "reason"),
    [
        (Scheme(8, False, 32), "at most 5 bits where asymmetric"),
        (Scheme(4, True, 16), "its blocks are 32 columns wide"),
        (Scheme(8, True, None, inputs=8), "take weights alone"),
    ],
)
def test_schemes_without_a_block_type_are_refused(scheme, reason):
    assert type_of(scheme) is None or scheme.group_size == 16
    assert reason in (FORMATS["gguf"].refusal(scheme, 64, 64) or "")


def test_models_that_llama_cpp_would_run_otherwise_are_refused():
    assert "gemma2 is not written here" in str(unsupported("gemma2"))
    sliding = config_of("mistral").to_dict()
    assert "without its sliding window of 8 tokens" in str(unsupported("mistral", sliding))
    assert "rope type 'yarn'" in str(unsupported("llama", {"rope_scaling": {"rope_type": "yarn"}}))
    assert unsupported("llama", config_of("llama").to_dict()) is None
    (sentence, *_) = FORMATS["gguf"].mistakes({}, {}, architecture_of({"model_type": "phi3"}))
    assert "phi3 is not written here" in sentence


def test_llama_3s_rope_factors_are_those_that_transformers_computes():
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = AutoConfig.for_model("llama", hidden_size=512, num_attention_heads=4, rope_parameters=rope)
    scaled = LlamaRotaryEmbedding(config).inv_freq
    plain = 1 / 500000.0 ** (torch.arange(0, 128, 2) / 128)

    factors = rope_factors(config.to_dict())

    assert factors is not None and len(set(factors.tolist())) > 1
    torch.testing.assert_close(plain / factors, scaled)


def byte_level(pre, **model):
    vocabulary = {"a": 0, "b": 1, "ab": 2}
    added = [{"id": 3, "content": "<|end|>", "special": True}, {"id": 4, "content": "<tool>", "special": False}]
    bpe = {"type": "BPE", "vocab": vocabulary, "merges": [["a", "b"]], **model}
    return {"model": bpe, "pre_tokenizer": pre, "added_tokens": added, "normalizer": None}


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
INSIDE = {**BYTES, "use_regex": False}


@pytest.mark.parametrize(
    ("pre", "name"),
    [
        (BYTES, "gpt-2"),
        ({"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTES]}, "smollm"),
        (
            {
                "type": "Sequence",
                "pretokenizers": [
                    {"type": "Split", "pattern": {"Regex": "(?i:'s|'t)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?x"}},
                    INSIDE,
                ],
            },
            "llama-bpe",
        ),
        (
            {
                "type": "Sequence",
                "pretokenizers": [
                    {"type": "Split", "pattern": {"Regex": "(?i:'s|'t)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?x"}},
                    INSIDE,
                ],
            },
            "qwen2",
        ),
    ],
)
def test_a_byte_level_tokenizer_is_written_with_llama_cpps_name_for_its_splitting(tmp_path, pre, name):
    (tmp_path / "tokenizer.json").write_text(json.dumps(byte_level(pre)))
    keys = {key: value for key, value, _ in vocabulary_of(tmp_path, 6).keys}

    assert keys["tokenizer.ggml.model"] == "gpt2" and keys["tokenizer.ggml.pre"] == name
    assert keys["tokenizer.ggml.tokens"] == ["a", "b", "ab", "<|end|>", "<tool>", "[PAD5]"]
    assert keys["tokenizer.ggml.token_type"] == [1, 1, 1, 3, 4, 5]


def test_a_tokenizer_that_llama_cpp_would_read_otherwise_is_left_out_and_that_is_said(tmp_path, glass):
    assert "no name for how its tokenizer splits" in vocabulary_of(glass, 1024).left_out
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "Unigram"}}))
    assert "type Unigram" in vocabulary_of(tmp_path, 8).left_out
    assert vocabulary_of(tmp_path / "nowhere", 8).keys == (("tokenizer.ggml.model", "no_vocab", "string"),)
    _, path, written = exported(tmp_path / "run", {"bits": 4})
    assert [event.kind for event in written.events] == ["tokenizer_left_out"]
    assert path.is_file()


def test_bfloat16_models_keep_bfloat16_where_nothing_is_quantised(tmp_path):
    random_model("llama", tmp_path / "model", torch.bfloat16, attention_bias=False, mlp_bias=False)
    stage = RoundToNearest(bits=4, group_size=32, ignore=("*.o_proj",))
    done, _ = apply_stage(stage, tmp_path / "model", tmp_path / "stage", stored=torch.bfloat16)
    export(done, tmp_path / "export" / "model", "gguf", torch.bfloat16, 10**9)
    path = tmp_path / "export" / "model" / "model.gguf"
    (tmp_path / "export" / "recipe.yaml").write_text("")
    (tmp_path / "read").mkdir()
    convert(path, tmp_path / "read", path.parent)
    windows = random_windows(count=2)

    assert tensors_of(path)["blk.0.attn_output.weight"].tensor_type.name == "BF16"
    torch.testing.assert_close(
        our_logits(tmp_path / "read", windows), our_logits(done.folder, windows), atol=5e-2, rtol=5e-2
    )


def test_a_scale_outside_float16_is_refused_with_its_name(tmp_path):
    random_model("llama", tmp_path / "model", torch.bfloat16, attention_bias=False, mlp_bias=False)
    done, _ = apply_stage(
        RoundToNearest(bits=4, group_size=32), tmp_path / "model", tmp_path / "stage", stored=torch.bfloat16
    )
    codes, grid = done.codes("model.layers.0.mlp.up_proj")
    from compress.checkpoints.formats.gguf import blocks
    from compress.errors import RecipeError
    from compress.quantization.grid import Grid

    with pytest.raises(RecipeError, match=r"up_proj has scales up to 1.05e\+06, outside the float16"):
        blocks(codes, Grid(grid.scheme, torch.full_like(grid.scale, 2.0**20), None), "Q4_0", "up_proj")


def test_scales_too_small_for_float16_are_an_event(tmp_path):
    from safetensors.torch import load_file, save_file

    random_model("llama", tmp_path / "model", torch.bfloat16, attention_bias=False, mlp_bias=False)
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.mlp.up_proj.weight"] *= 2.0**-14
    save_file(tensors, path, {"format": "pt"})
    stage = RoundToNearest(bits=8, group_size=32)
    done, _ = apply_stage(stage, tmp_path / "model", tmp_path / "stage", stored=torch.bfloat16)

    written = export(done, tmp_path / "export" / "model", "gguf", torch.bfloat16, 10**9)

    found = [event for event in written.events if event.kind == "scales_rounded"]
    assert [event.where for event in found] == ["model.layers.0.mlp.up_proj"]
    assert found[0].data["relative_error"] > 0.01


PREPEND = {"type": "Prepend", "prepend": "\u2581"}
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
PIECES = {"model": {"type": "BPE", "byte_fallback": True, "vocab": {"\u2581": 0, "a": 1, "<0x0A>": 2}, "merges": []}}


@pytest.mark.parametrize(
    ("parts", "prefix"),
    [
        ({"normalizer": {"type": "Sequence", "normalizers": [PREPEND, REPLACE]}}, True),
        ({"normalizer": REPLACE}, False),
        ({"pre_tokenizer": {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first"}}, True),
        ({"pre_tokenizer": {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "never"}}, False),
    ],
)
def test_a_sentencepiece_like_tokenizer_says_whether_text_begins_with_a_space(tmp_path, parts, prefix):
    (tmp_path / "tokenizer.json").write_text(json.dumps({**PIECES, **parts}))
    keys = {key: value for key, value, _ in vocabulary_of(tmp_path, 3).keys}

    assert keys["tokenizer.ggml.model"] == "llama" and keys["tokenizer.ggml.add_space_prefix"] is prefix
    assert keys["tokenizer.ggml.token_type"] == [1, 1, 6]


def test_a_sentencepiece_like_tokenizer_that_changes_text_is_left_out(tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps({**PIECES, "normalizer": {"type": "Lowercase"}}))
    assert "does not prepare text" in vocabulary_of(tmp_path, 3).left_out


def test_llama_3s_rope_is_read_back_and_its_factors_are_counted(tmp_path):
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8,
    }
    done, path, written = exported(tmp_path, {"bits": 8}, rope_parameters=rope)
    (tmp_path / "read").mkdir()
    convert(path, tmp_path / "read", path.parent)
    windows = random_windows(count=2, tokens=48)

    assert FORMATS["gguf"].added_bytes(done.config) == 4 * 8
    assert tensors_of(path)["rope_freqs.weight"].data.tolist() == rope_factors(done.config).tolist()
    torch.testing.assert_close(
        our_logits(tmp_path / "read", windows), our_logits(done.folder, windows), atol=2e-2, rtol=2e-2
    )
    assert written.bytes == sum(int(tensor.n_bytes) for tensor in tensors_of(path).values())
