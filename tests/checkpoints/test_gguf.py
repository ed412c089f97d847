"""GGUF, against two readers: the gguf package's, and transformers' or, of types that it does not know, ours.

`make loaders` runs llama.cpp itself.
"""

from __future__ import annotations

import json

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.architecture import architecture_of
from compress.artifacts.verify_gguf import scan
from compress.checkpoints.export import export
from compress.checkpoints.formats import FORMATS
from compress.checkpoints.formats.gguf import effective_bits, type_of
from compress.checkpoints.formats.gguf_names import KINDS, completed, metadata
from compress.checkpoints.formats.gguf_rope import tensors_of
from compress.checkpoints.formats.gguf_tokenizer import vocabulary_of
from compress.checkpoints.from_gguf import convert
from compress.checkpoints.reader import Checkpoint
from compress.errors import RecipeError
from compress.memory.predict import stored_bytes
from compress.quantization.grid import dequantize
from compress.quantization.scheme import Scheme
from compress.stages import RoundToNearest
from compress.steps.shapes import Shape
from tests.tiny import apply_stage, config_of, our_logits, random_model, random_windows

SCHEMES = {
    "Q4_0": [{"bits": 4}, {"bits": 3}, {"bits": 2}],
    "Q4_1": [{"bits": 4, "symmetric": False}, {"bits": 3, "symmetric": False}],
    "Q5_0": [{"bits": 5}],
    "Q5_1": [{"bits": 5, "symmetric": False}],
    "Q8_0": [{"bits": 6}, {"bits": 8}],
}
K_QUANTS = {"Q2_K": 2, "Q3_K": 3, "Q4_K": 4, "Q5_K": 5, "Q6_K": 6}
WIDE = {"hidden_size": 256, "intermediate_size": 512}
"""Super-blocks are 256 columns wide."""
CASES = [(kind, fields) for kind, several in SCHEMES.items() for fields in several]


FULL = "full_attention"
WRITABLE = {
    "llama": {"attention_bias": False, "mlp_bias": False},
    "mistral": {"sliding_window": None},
    "qwen2": {"use_sliding_window": False, "layer_types": [FULL] * 2},
    "qwen3": {},
    "smollm3": {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0]},
    "gemma": {},
    "gemma2": {},
    "gemma3_text": {},
    "phi3": {"sliding_window": None},
}
"""Changes to the small models of tests.tiny that llama.cpp runs as transformers does."""


def exported(tmp_path, fields, name="llama", **changes):
    changes = {**WRITABLE[name], **changes}
    random_model(name, tmp_path / "model", torch.float16, **changes)
    grid = fields if "k_quant" in fields else {"group_size": 32, **fields}
    done, _ = apply_stage(RoundToNearest(**grid), tmp_path / "model", tmp_path / "stage")
    written = export(done, tmp_path / "export" / "model", "gguf", torch.float16, 10**9)
    (tmp_path / "export" / "recipe.yaml").write_text("")
    return done, tmp_path / "export" / "model" / "model.gguf", written


def tensors_of_file(path):
    return {tensor.name: tensor for tensor in gguf.GGUFReader(str(path)).tensors}


@pytest.mark.parametrize(("kind", "fields"), CASES, ids=[f"{kind}-{fields['bits']}" for kind, fields in CASES])
@pytest.mark.parametrize("group", [32, "channel"])
def test_the_packages_reader_gives_our_values(tmp_path, kind, fields, group):
    done, path, _ = exported(tmp_path, {**fields, "group_size": group})
    tensor = tensors_of_file(path)["blk.1.ffn_down.weight"]

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


@pytest.mark.parametrize(("kind", "bits"), [("Q4_1", 4), ("Q4_1", 3), ("Q5_1", 5)])
@pytest.mark.parametrize("group", [32, "channel"])
def test_free_minima_are_in_the_file_as_they_were_found(tmp_path, kind, bits, group):
    fields = {"bits": bits, "symmetric": False, "zero_points": "free", "group_size": group}
    done, path, written = exported(tmp_path, fields)
    tensor = tensors_of_file(path)["blk.1.ffn_down.weight"]

    values = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type))

    assert tensor.tensor_type.name == kind
    # Unlike a multiple of the scale, a minimum of its own is not rounded on its way there.
    torch.testing.assert_close(values, done.dense("model.layers.1.mlp.down_proj"), rtol=1e-5, atol=1e-6)
    assert [event.kind for event in written.events] == ["tokenizer_left_out"]
    (tmp_path / "read").mkdir()
    convert(path, tmp_path / "read", path.parent)
    windows = random_windows(count=2)
    ours, theirs = our_logits(done.folder, windows), our_logits(tmp_path / "read", windows)
    torch.testing.assert_close(theirs, ours, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(("kind", "bits"), K_QUANTS.items())
def test_k_quants_are_read_as_our_values(tmp_path, kind, bits):
    done, path, written = exported(tmp_path, {"bits": bits, "k_quant": True}, **WIDE)
    found, format_ = tensors_of_file(path), FORMATS["gguf"]

    for theirs, ours in (("ffn_down", "mlp.down_proj"), ("ffn_up", "mlp.up_proj")):
        tensor = found[f"blk.1.{theirs}.weight"]
        values = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type))
        assert tensor.tensor_type.name == kind
        torch.testing.assert_close(values, done.dense(f"model.layers.1.{ours}"), rtol=1e-5, atol=1e-6)
    assert effective_bits(path) == 8 * done.schemes["model.layers.0.mlp.up_proj"].k_quant.bytes / 256
    predicted = stored_bytes(Shape(done.config).tensors, Shape(done.config).everything, done.schemes, 2, format_)
    assert written.bytes == predicted == sum(int(tensor.n_bytes) for tensor in found.values())
    assert scan(path, "model.gguf") == (len(found), [])


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])
def test_k_quants_beside_other_types_are_read_back_with_our_logits(tmp_path, bits):
    """Rows of queries and keys change places; only the MLP's last linear is wide enough for a super-block."""
    overrides = (
        {"match": "*_proj", "bits": 4, "group_size": 32},
        {"match": "*.down_proj", "bits": bits, "k_quant": True},
    )
    fields = {"bits": bits, "k_quant": True, "overrides": overrides}
    done, path, _ = exported(tmp_path, fields, hidden_size=64, intermediate_size=256)
    (tmp_path / "read").mkdir()
    previous = convert(path, tmp_path / "read", path.parent)
    windows = random_windows(count=2)

    ours, theirs = our_logits(done.folder, windows), our_logits(tmp_path / "read", windows)

    assert f"Q{bits}_K x2" in previous and "Q4_0 x12" in previous
    torch.testing.assert_close(theirs, ours, atol=1e-2, rtol=1e-2)


def test_queries_in_k_quants_are_reordered_with_their_integers(tmp_path):
    done, path, _ = exported(tmp_path, {"bits": 4, "k_quant": True}, **WIDE)
    (tmp_path / "read").mkdir()
    convert(path, tmp_path / "read", path.parent)
    windows = random_windows(count=2)

    torch.testing.assert_close(
        our_logits(tmp_path / "read", windows), our_logits(done.folder, windows), atol=1e-2, rtol=1e-2
    )


def test_damaged_scales_of_super_blocks_are_found(tmp_path):
    _, path, _ = exported(tmp_path, {"bits": 6, "k_quant": True}, **WIDE)
    tensor = tensors_of_file(path)["blk.0.ffn_up.weight"]
    content = bytearray(path.read_bytes())
    content[tensor.data_offset + 208 : tensor.data_offset + 210] = np.float16(np.inf).tobytes()
    path.write_bytes(content)

    assert scan(path, "model.gguf")[1] == ["model.gguf: blk.0.ffn_up.weight: 1 values are NaN or infinite"]


@pytest.mark.parametrize("name", WRITABLE)
def test_it_is_read_back_with_our_logits(tmp_path, name):
    done, path, written = exported(tmp_path, {"bits": 4}, name)
    (tmp_path / "read").mkdir()
    previous = convert(path, tmp_path / "read", path.parent)
    windows = random_windows(count=2)

    ours, theirs = our_logits(done.folder, windows), our_logits(tmp_path / "read", windows)

    assert f"Q4_0 x{len(done.schemes)}" in previous
    assert written.bytes == sum(int(tensor.n_bytes) for tensor in tensors_of_file(path).values())
    # Products of code and scale are float16 here, float32 there.
    torch.testing.assert_close(theirs, ours, atol=1e-2, rtol=1e-2)
    assert ours.std() > 0.1


PARTS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
SANDWICH = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
"""llama.cpp's names, written down here by hand."""


@pytest.mark.parametrize("name", WRITABLE)
def test_every_tensor_in_16_bits_has_the_models_values(tmp_path, name):
    random_model(name, tmp_path / "model", torch.float16, **WRITABLE[name])
    source = Checkpoint(tmp_path / "model")
    export(source, tmp_path / "export", "gguf", torch.float16, 10**9)
    found = tensors_of_file(tmp_path / "export" / "model.gguf")
    parts = PARTS | (SANDWICH if name in ("gemma2", "gemma3_text") else {})
    parts |= {"ffn_up": "mlp.gate_up_proj"} if name == "phi3" else {}
    heads = {"self_attn.q_proj": 4, "self_attn.k_proj": 2} if name in ("llama", "mistral", "smollm3") else {}

    seen = set()
    for theirs, tensor in found.items():
        *block, part, leaf = theirs.split(".")
        ours = f"{f'model.layers.{block[1]}.' if block else ''}{parts[part]}.{leaf}"
        expected = source.read(ours).float()
        if parts[part] in heads:  # (heads, halves, half a head) becomes (heads, half a head, halves)
            split = expected.view(heads[parts[part]], 2, -1, *expected.shape[1:])
            expected = split.transpose(1, 2).reshape(expected.shape)
        if part.endswith("norm") and name.startswith("gemma"):
            expected = expected + 1
        assert torch.equal(torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type)), expected), theirs
        seen.add(ours)
    assert seen == set(source.names)


@pytest.mark.parametrize("name", WRITABLE)
@pytest.mark.parametrize("bits", [4, 8])
def test_bytes_are_what_plan_predicts(tmp_path, name, bits):
    fields = {"bits": bits, "ignore": ("*.o_proj",)}
    done, _, written = exported(tmp_path, fields, name)
    shape, format_ = Shape(done.config), FORMATS["gguf"]

    predicted = stored_bytes(shape.tensors, shape.everything, done.schemes, 2, format_)

    assert written.bytes == predicted + format_.added_bytes(done.config)


def rope(kind, **more):
    return {"rope_type": kind, "rope_theta": 10000.0, **more}


LLAMA3 = rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8)
YARN = rope("yarn", factor=4.0, original_max_position_embeddings=16)
LONGROPE = rope(
    "longrope",
    short_factor=[1 + index / 8 for index in range(8)],
    long_factor=[2.0 + index for index in range(8)],
    original_max_position_embeddings=16,
)


@pytest.mark.parametrize(
    ("name", "parameters", "tensors"),
    [
        ("llama", LLAMA3, {"rope_freqs.weight"}),
        ("llama", YARN, set()),
        ("smollm3", YARN, set()),
        ("llama", LONGROPE, {"rope_factors_long.weight", "rope_factors_short.weight"}),
        ("phi3", LONGROPE, {"rope_factors_long.weight", "rope_factors_short.weight"}),
    ],
)
def test_scaled_ropes_are_read_back_and_their_factors_are_counted(tmp_path, name, parameters, tensors):
    changes = {"original_max_position_embeddings": 16} if name == "phi3" else {}
    done, path, written = exported(tmp_path, {"bits": 8}, name, rope_parameters=parameters, **changes)
    (tmp_path / "read").mkdir()
    convert(path, tmp_path / "read", path.parent)
    windows, found = random_windows(count=2, tokens=48), tensors_of_file(path)

    assert FORMATS["gguf"].added_bytes(done.config) == 4 * 8 * len(tensors)
    assert {each for each in found if each.startswith("rope")} == tensors
    for each, values in tensors_of(completed(done.config)).items():
        assert found[each].data.tolist() == values.tolist()
    torch.testing.assert_close(
        our_logits(tmp_path / "read", windows), our_logits(done.folder, windows), atol=2e-2, rtol=2e-2
    )
    assert written.bytes == sum(int(tensor.n_bytes) for tensor in found.values())


def keys_of(name, **changes):
    return {key: value for key, value, _ in metadata(config_of(name, **{**WRITABLE[name], **changes}))}


def test_keys_tell_llama_cpp_what_tensors_do_not():
    gemma = keys_of("gemma2")
    assert gemma["gemma2.attention.sliding_window"] == 8
    assert gemma["gemma2.attention.sliding_window_pattern"] == [True, False]
    assert gemma["gemma2.attn_logit_softcapping"] == 0.5 and gemma["gemma2.final_logit_softcapping"] == 2.0
    scaled = {FULL: rope("linear", factor=8.0), "sliding_attention": {**rope("default"), "rope_theta": 100.0}}
    gemma = keys_of("gemma3_text", rope_parameters=scaled)
    assert gemma["gemma3.rope.freq_base"] == 10000.0 and gemma["gemma3.rope.freq_base_swa"] == 100.0
    assert gemma["gemma3.rope.scaling.type"] == "linear" and gemma["gemma3.rope.scaling.factor"] == 8.0
    assert keys_of("gemma3_text", layer_types=[FULL] * 2)["gemma3.attention.sliding_window"] == 0
    half = {**rope("default"), "partial_rotary_factor": 0.5}
    assert keys_of("phi3", rope_parameters=half)["phi3.rope.dimension_count"] == 8


def test_attention_factors_are_what_llama_cpp_has_not_multiplied_by_already():
    key = "llama.rope.scaling.attn_factor"
    own = 0.1 * np.log(4.0) + 1
    assert keys_of("llama", rope_parameters=YARN)[key] == 1.0
    assert keys_of("llama", rope_parameters={**YARN, "attention_factor": 1.5})[key] == pytest.approx(1.5 / own)
    scales = {"mscale": 2.0, "mscale_all_dim": 0.5}
    quotient = (0.2 * np.log(4.0) + 1) / (0.05 * np.log(4.0) + 1)
    assert keys_of("llama", rope_parameters={**YARN, **scales})[key] == pytest.approx(quotient / own)
    # sqrt(1 + ln(64 / 16) / ln(16)) = sqrt(1.5)
    assert keys_of("llama", rope_parameters=LONGROPE)[key] == pytest.approx(1.5**0.5)


def test_biases_of_llamas_queries_are_reordered_with_their_rows(tmp_path):
    done, path, _ = exported(tmp_path, {"bits": 8}, attention_bias=True)
    found = tensors_of_file(path)["blk.0.attn_q.bias"].data
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
    kinds = {name: tensor.tensor_type.name for name, tensor in tensors_of_file(path).items()}

    assert kinds["blk.0.ffn_down.weight"] == "Q8_0" and kinds["blk.0.ffn_up.weight"] == "Q4_0"
    assert kinds["blk.0.attn_output.weight"] == "F16" and kinds["blk.0.attn_norm.weight"] == "F32"


@pytest.mark.parametrize(
    ("scheme", "reason"),
    [
        (Scheme(8, False, 32), "at most 5 bits where asymmetric"),
        (Scheme(4, True, 16), "its blocks are 32 columns wide"),
        (Scheme(8, True, None, inputs=8), "take weights alone"),
        (Scheme.of_k_quant(4), "its super-blocks are 256 columns wide"),
    ],
)
def test_schemes_without_a_block_type_are_refused(scheme, reason):
    assert type_of(scheme) in (None, "Q4_0", "Q4_K")
    assert reason in (FORMATS["gguf"].refusal(scheme, 64, 64) or "")


def refused(name, **changes):
    return " ".join(FORMATS["gguf"].refuses_config(config_of(name, **{**WRITABLE[name], **changes}).to_dict()))


@pytest.mark.parametrize(
    ("name", "changes", "sentence"),
    [
        ("mistral", {"sliding_window": 8}, "without its sliding window of 8 tokens"),
        ("phi3", {"sliding_window": 63}, "without its sliding window of 63 tokens"),
        ("smollm3", {"use_sliding_window": True, "sliding_window": 8, "layer_types": None}, "window of 8 tokens"),
        ("smollm3", {"no_rope_layers": [1, 0, 1, 0]}, "without rope in every fourth layer"),
        ("smollm3", {"mlp_bias": True}, "no place for biases of smollm3's attention and MLP"),
        ("qwen3", {"attention_bias": True}, "no place for biases"),
        ("gemma", {"tie_word_embeddings": False}, "takes gemma's embedding for its head"),
        ("gemma2", {"tie_word_embeddings": False}, "takes gemma2's embedding for its head"),
        ("gemma2", {"query_pre_attn_scalar": 32}, "2 blocks by the root of 16, and query_pre_attn_scalar is 32"),
        ("gemma2", {"attn_logit_softcapping": None}, "caps gemma2's attention and logits"),
        ("gemma2", {"layer_types": [FULL] * 2}, "of which no layer slides"),
        ("gemma2", {"hidden_activation": "gelu"}, "with gelu_pytorch_tanh, and its activation is gelu"),
        ("gemma3_text", {"query_pre_attn_scalar": 32}, "query_pre_attn_scalar is 32"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "wants it in both directions"),
        ("llama", {"hidden_act": "gelu"}, "with silu, and its activation is gelu"),
        (
            "llama",
            {"rope_parameters": rope("dynamic", factor=2.0)},
            "rope type 'dynamic' is not written here for llama",
        ),
        ("qwen2", {"rope_parameters": LLAMA3}, "rope type 'llama3' is not written here for qwen2"),
        (
            "gemma3_text",
            {"rope_parameters": {FULL: YARN, "sliding_attention": rope("default")}},
            "rope type 'yarn' is not written here for gemma3_text; default, linear are",
        ),
        (
            "gemma3_text",
            {"rope_parameters": {FULL: rope("default"), "sliding_attention": rope("linear", factor=2.0)}},
            "does not scale the rope of sliding layers, which has type 'linear'",
        ),
        ("llama", {"rope_parameters": {**YARN, "beta_fast": 64.0}}, "beta_fast 32, beta_slow 1"),
        ("llama", {"rope_parameters": {**YARN, "truncate": False}}, "beta_fast 32, beta_slow 1"),
    ],
)
def test_models_that_llama_cpp_would_run_otherwise_are_refused(name, changes, sentence):
    assert sentence in refused(name, **changes)


def test_models_that_llama_cpp_runs_are_not_refused():
    assert set(WRITABLE) == set(KINDS)
    assert not any(refused(name) for name in WRITABLE)
    # A window as long as the context hides nothing.
    assert refused("phi3", sliding_window=64) == ""
    # Blocks and widths of the models of 27B: hidden_size / heads instead of head_dim.
    large = {"num_hidden_layers": 46, "query_pre_attn_scalar": 16, "head_dim": 32, "layer_types": None}
    assert refused("gemma2", **large) == ""
    assert "the root of 16" in refused("gemma2", **{**large, "query_pre_attn_scalar": 32})


SMALL = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 160,
}
OF_OLD = {
    "gemma3_text": {
        "num_hidden_layers": 12,
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "sliding_window": 16,
        "sliding_window_pattern": 6,
        "rope_theta": 1e6,
        "rope_local_base_freq": 500.0,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    },
    "phi3": {
        "num_hidden_layers": 2,
        "max_position_embeddings": 256,
        "original_max_position_embeddings": 64,
        "sliding_window": 512,
        "rope_theta": 5000.0,
        "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
    },
    "smollm3": {"num_hidden_layers": 8, "no_rope_layers": None, "no_rope_layer_interval": 4},
    "gemma": {"num_hidden_layers": 2, "head_dim": 16, "hidden_act": "gelu", "hidden_activation": None},
}
"""Configs as older versions of transformers wrote them, small."""


@pytest.mark.parametrize("name", OF_OLD)
def test_configs_of_older_versions_are_understood(name):
    config = {"model_type": name, **SMALL, **OF_OLD[name]}

    assert FORMATS["gguf"].refuses_config(config) == []
    keys = {key: value for key, value, _ in metadata(completed(config))}
    if name == "gemma3_text":
        assert keys["gemma3.attention.sliding_window_pattern"] == [*[True] * 5, False] * 2
        assert keys["gemma3.rope.freq_base"] == 1e6 and keys["gemma3.rope.freq_base_swa"] == 500.0
        assert keys["gemma3.rope.scaling.factor"] == 8.0
    if name == "phi3":
        assert keys["phi3.rope.scaling.type"] == "longrope"
        assert keys["phi3.rope.scaling.original_context_length"] == 64
        # sqrt(1 + ln(256 / 64) / ln(64)) = sqrt(4 / 3)
        assert keys["phi3.rope.scaling.attn_factor"] == pytest.approx((4 / 3) ** 0.5)
        assert FORMATS["gguf"].added_bytes(config) == 2 * 4 * 8


def test_a_type_without_an_entry_is_refused_once():
    (sentence, *more) = FORMATS["gguf"].mistakes({}, {}, architecture_of({"model_type": "gpt2"}))
    assert any("gpt2 is not written here; llama, mistral" in each for each in (sentence, *more))
    assert FORMATS["gguf"].refuses_config(config_of("gpt2").to_dict()) == []


def test_llama_3s_rope_factors_are_those_that_transformers_computes():
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    parameters = {**LLAMA3, "rope_theta": 500000.0, "original_max_position_embeddings": 8192}
    config = AutoConfig.for_model("llama", hidden_size=512, num_attention_heads=4, rope_parameters=parameters)
    scaled = LlamaRotaryEmbedding(config).inv_freq
    plain = 1 / 500000.0 ** (torch.arange(0, 128, 2) / 128)

    factors = tensors_of(config)["rope_freqs.weight"]

    assert len(set(factors.tolist())) > 1
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

    assert tensors_of_file(path)["blk.0.attn_output.weight"].tensor_type.name == "BF16"
    torch.testing.assert_close(
        our_logits(tmp_path / "read", windows), our_logits(done.folder, windows), atol=5e-2, rtol=5e-2
    )


def test_blocks_that_llama_cpp_would_run_otherwise_are_refused_once_they_are_known(tmp_path):
    """Depth pruning may leave other layers than `plan` saw: those without rope are no longer every fourth."""
    random_model("smollm3", tmp_path / "model", num_hidden_layers=3, no_rope_layers=[1, 1, 0], attention_bias=False)
    kept, _ = apply_stage(RoundToNearest(bits=4, group_size=32), tmp_path / "model", tmp_path / "stage")

    with pytest.raises(RecipeError, match=r"without rope in every fourth layer.*the stages are kept"):
        export(kept, tmp_path / "export" / "model", "gguf", torch.float16, 10**9)

    assert not (tmp_path / "export" / "model" / "model.gguf").exists()


def test_a_tensor_that_gguf_has_no_name_for_is_told_by_name(tmp_path):
    random_model("llama", tmp_path / "model", attention_bias=False, mlp_bias=False)
    path = tmp_path / "model" / "model.safetensors"
    save_file(load_file(path) | {"model.layers.0.extra.weight": torch.ones(4)}, path, {"format": "pt"})

    with pytest.raises(RecipeError, match=r"no name for the tensor model\.layers\.0\.extra\.weight"):
        export(Checkpoint(tmp_path / "model"), tmp_path / "export" / "model", "gguf", torch.float16, 10**9)


def test_a_scale_outside_float16_is_refused_with_its_name(tmp_path):
    random_model("llama", tmp_path / "model", torch.bfloat16, attention_bias=False, mlp_bias=False)
    done, _ = apply_stage(
        RoundToNearest(bits=4, group_size=32), tmp_path / "model", tmp_path / "stage", stored=torch.bfloat16
    )
    codes, grid = done.codes("model.layers.0.mlp.up_proj")
    from compress.checkpoints.formats.gguf import blocks
    from compress.quantization.grid import Grid

    with pytest.raises(RecipeError, match=r"up_proj has scales up to 1.05e\+06 or more, outside the float16"):
        blocks(codes, Grid(grid.scheme, torch.full_like(grid.scale, 2.0**20), None), "Q4_0", "up_proj")
    held_back = torch.full_like(grid.scale, torch.finfo(torch.float16).max, dtype=torch.float16)
    with pytest.raises(RecipeError, match=r"up_proj has scales up to 6.55e\+04 or more, outside the float16"):
        blocks(codes, Grid(grid.scheme, held_back, None), "Q4_0", "up_proj")


def test_scales_too_small_for_float16_are_an_event(tmp_path):
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
SPLIT = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
"""As in Gemma's tokenizer.json, behind REPLACE."""
PIECES = {"model": {"type": "BPE", "byte_fallback": True, "vocab": {"\u2581": 0, "a": 1, "<0x0A>": 2}, "merges": []}}


@pytest.mark.parametrize(
    ("parts", "prefix"),
    [
        ({"normalizer": {"type": "Sequence", "normalizers": [PREPEND, REPLACE]}}, True),
        ({"normalizer": REPLACE}, False),
        ({"normalizer": REPLACE, "pre_tokenizer": SPLIT}, False),
        ({"pre_tokenizer": {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first"}}, True),
        ({"pre_tokenizer": {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "never"}}, False),
    ],
)
def test_a_sentencepiece_like_tokenizer_says_whether_text_begins_with_a_space(tmp_path, parts, prefix):
    (tmp_path / "tokenizer.json").write_text(json.dumps({**PIECES, **parts}))
    keys = {key: value for key, value, _ in vocabulary_of(tmp_path, 3).keys}

    assert keys["tokenizer.ggml.model"] == "llama" and keys["tokenizer.ggml.add_space_prefix"] is prefix
    assert keys["tokenizer.ggml.token_type"] == [1, 1, 6]


def test_added_tokens_of_spaces_are_looked_for_in_text_as_it_is_or_the_tokenizer_is_left_out(tmp_path):
    added = [{"id": 3, "content": "\u2581\u2581", "special": False, "normalized": False}]
    content = {**PIECES, "normalizer": REPLACE, "added_tokens": added}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert vocabulary_of(tmp_path, 4).left_out == ""
    added[0]["normalized"] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert "looks for its added tokens before it writes spaces" in vocabulary_of(tmp_path, 4).left_out


def test_a_sentencepiece_like_tokenizer_that_changes_text_is_left_out(tmp_path):
    for parts in ({"normalizer": PREPEND}, {"normalizer": PREPEND, "pre_tokenizer": SPLIT}):
        (tmp_path / "tokenizer.json").write_text(json.dumps({**PIECES, **parts}))
        assert "does not prepare text" in vocabulary_of(tmp_path, 3).left_out
    (tmp_path / "tokenizer.json").write_text(json.dumps({**PIECES, "normalizer": {"type": "Lowercase"}}))
    assert "does not prepare text" in vocabulary_of(tmp_path, 3).left_out
