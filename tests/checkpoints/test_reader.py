"""One reader for every layout: plain, sharded, working, packed; and every way a folder can be broken."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.checkpoints.folder import DamagedCheckpointError
from compress.checkpoints.reader import Checkpoint
from compress.errors import RecipeError
from compress.quantization.grid import dequantize
from compress.stages import RoundToNearest
from tests.tiny import apply_stage, our_logits, random_model, random_windows, their_logits


@pytest.fixture
def model(tmp_path):
    random_model("llama", tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_are_read_in_the_dtype_they_are_stored_in(tmp_path, dtype):
    random_model("llama", tmp_path / "model", dtype)
    stored = load_file(tmp_path / "model" / "model.safetensors")

    checkpoint = Checkpoint(tmp_path / "model")

    assert set(checkpoint.names) == set(stored)
    assert checkpoint.weight_bytes == sum(tensor.nbytes for tensor in stored.values())
    for name, tensor in stored.items():
        assert checkpoint.read(name).dtype == dtype and torch.equal(checkpoint.read(name), tensor)
        assert checkpoint.header(name)[1] == tuple(tensor.shape)


@pytest.mark.parametrize(
    ("name", "buffers"),
    [
        ("llama", {"model.layers.0.self_attn.rotary_emb.inv_freq": (8,)}),
        ("gpt2", {"transformer.h.0.attn.bias": (1, 1, 64, 64), "transformer.h.0.attn.masked_bias": ()}),
    ],
)
def test_buffers_that_old_files_hold_are_no_parameters(tmp_path, name, buffers):
    random_model(name, tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    stored, bytes_before = load_file(path), Checkpoint(tmp_path / "model").weight_bytes
    save_file(stored | {key: torch.ones(shape) for key, shape in buffers.items()}, path, {"format": "pt"})

    checkpoint = Checkpoint(tmp_path / "model")

    assert set(checkpoint.names) == set(stored), "biases of GPT-2's c_attn among them"
    assert checkpoint.weight_bytes == bytes_before


@pytest.mark.parametrize("said", [True, None])
def test_a_copy_of_the_embedding_beside_a_tied_head_is_left_out(tmp_path, said):
    """`None`: config.json does not say it, and Gemma's class does."""
    name = "llama" if said else "gemma"
    random_model(name, tmp_path / "model", tie_word_embeddings=True)
    folder = tmp_path / "model"
    config = json.loads((folder / "config.json").read_text())
    if said is None:
        config.pop("tie_word_embeddings", None)
        (folder / "config.json").write_text(json.dumps(config))
    before = Checkpoint(folder)
    stored = load_file(folder / "model.safetensors")
    copy = stored["model.embed_tokens.weight"].clone()
    save_file(stored | {"lm_head.weight": copy}, folder / "model.safetensors", {"format": "pt"})

    found = Checkpoint(folder)

    assert found.names == before.names and found.tied_head and found.head_stored_twice == "equal"
    for other in (copy.half(), copy.bfloat16(), torch.full_like(copy, float("nan"))):
        embedding = torch.full_like(copy, float("nan")) if other.isnan().any() else copy
        both = {"model.embed_tokens.weight": embedding, "lm_head.weight": other}
        save_file(stored | both, folder / "model.safetensors", {"format": "pt"})
        assert Checkpoint(folder).head_stored_twice == "equal", "a rounded copy, and one of a damaged embedding"
    save_file(stored | {"lm_head.weight": copy + 1}, folder / "model.safetensors", {"format": "pt"})
    assert Checkpoint(folder).head_stored_twice == "differs"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tied_and_untied_heads_give_transformers_logits(tmp_path, tied, dtype):
    model = random_model("llama", tmp_path / "model", dtype, tie_word_embeddings=tied)
    windows = random_windows(count=2)

    assert Checkpoint(tmp_path / "model").tied_head == tied
    torch.testing.assert_close(
        our_logits(tmp_path / "model", windows), their_logits(model, windows), atol=2e-5, rtol=1e-4
    )


def test_a_sharded_folder_reads_like_a_single_file(model, tmp_path):
    tensors = load_file(model / "model.safetensors")
    sharded = shutil.copytree(model, tmp_path / "sharded")
    (sharded / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, sharded / file)
        weight_map |= dict.fromkeys(part, file)
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    whole, parts = Checkpoint(model), Checkpoint(sharded)
    assert whole.names == parts.names
    assert all(torch.equal(whole.read(name), parts.read(name)) for name in whole.names)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_working_checkpoint_gives_the_values_of_its_codes(model, tmp_path, symmetric):
    checkpoint, _ = apply_stage(
        RoundToNearest(bits=4, symmetric=symmetric, group_size=32, ignore=("*.o_proj",)), model, tmp_path / "stage"
    )
    source = Checkpoint(model)

    state = checkpoint.dense_state("model.layers.1")
    assert set(state) == set(source.dense_state("model.layers.1"))
    codes, grid = checkpoint.codes("model.layers.1.mlp.up_proj")
    assert torch.equal(state["mlp.up_proj.weight"], dequantize(codes, grid))
    assert torch.equal(state["self_attn.o_proj.weight"], source.read("model.layers.1.self_attn.o_proj.weight"))
    assert torch.equal(state["mlp.up_proj.bias"], source.read("model.layers.1.mlp.up_proj.bias"))


def test_old_gpt2_names_without_the_prefix_are_found_under_the_models_names(tmp_path):
    model = random_model("gpt2", tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    stored = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
    stored["h.0.attn.bias"] = torch.tril(torch.ones(1, 1, 64, 64))  # a mask that the first GPT-2 files carry
    save_file(stored, file)
    windows = random_windows(count=2)

    checkpoint = Checkpoint(tmp_path / "model")

    assert "transformer.h.0.attn.c_attn.weight" in checkpoint.names
    assert checkpoint.tied_head
    torch.testing.assert_close(
        our_logits(tmp_path / "model", windows), their_logits(model, windows), atol=2e-5, rtol=1e-4
    )


def test_transposed_linears_are_given_as_outputs_by_inputs(tmp_path):
    random_model("gpt2", tmp_path / "model")

    checkpoint = Checkpoint(tmp_path / "model")

    assert checkpoint.read("transformer.h.0.mlp.c_fc.weight").shape == (64, 96)
    assert checkpoint.matrix("transformer.h.0.mlp.c_fc").shape == (96, 64)


def test_a_quantised_conv1d_is_stored_and_read_in_its_own_layout(tmp_path):
    random_model("gpt2", tmp_path / "model")
    checkpoint, _ = apply_stage(RoundToNearest(bits=8, group_size=32), tmp_path / "model", tmp_path / "stage")

    dense = checkpoint.dense("transformer.h.0.mlp.c_fc")
    source = Checkpoint(tmp_path / "model").read("transformer.h.0.mlp.c_fc.weight")
    assert dense.shape == source.shape == (64, 96)
    torch.testing.assert_close(dense.float(), source, atol=0.01, rtol=0)


def test_a_truncated_file_is_an_error_when_it_is_opened(model):
    file = model / "model.safetensors"
    content = file.read_bytes()
    for length in (0, 4, 100, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:length])
        with pytest.raises(DamagedCheckpointError, match="damaged or truncated"):
            Checkpoint(model)


def test_a_missing_shard_is_named(model):
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "part-2.safetensors"}}))

    with pytest.raises(DamagedCheckpointError, match=r"not there: part-2\.safetensors"):
        Checkpoint(model)


@pytest.mark.parametrize("content", ["{", "[]", '{"weights": {}}', '{"weight_map": []}'])
def test_a_damaged_index_is_a_damaged_checkpoint(model, content):
    (model / "model.safetensors.index.json").write_text(content)

    with pytest.raises(DamagedCheckpointError, match=r"model\.safetensors\.index\.json"):
        Checkpoint(model)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "weights.pkl"])
def test_pickles_are_refused_even_with_nothing_else_there(model, name):
    (model / "model.safetensors").rename(model / name)

    with pytest.raises(RecipeError, match=r"pickles.*can run code.*never read here"):
        Checkpoint(model)


def test_pickles_beside_safetensors_are_left_alone(model):
    (model / "pytorch_model.bin").write_bytes(b"not even a pickle")

    assert Checkpoint(model).names


def test_a_folder_without_a_config_is_no_model(tmp_path):
    with pytest.raises(RecipeError, match=r"no config\.json"):
        Checkpoint(tmp_path)


def test_a_folder_without_weights_says_so(model):
    (model / "model.safetensors").unlink()

    with pytest.raises(RecipeError, match=r"no \.safetensors files"):
        Checkpoint(model)


def test_the_digest_changes_with_weights_config_and_tokenizer(model):
    digests = {Checkpoint(model).digest()}
    assert Checkpoint(model).digest() in digests

    (model / "tokenizer.json").write_text("{}")
    digests.add(Checkpoint(model).digest())
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-4}))
    digests.add(Checkpoint(model).digest())
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, model / "model.safetensors")
    digests.add(Checkpoint(model).digest())

    assert len(digests) == 4


def test_a_tensor_that_is_not_there_is_named(model):
    with pytest.raises(DamagedCheckpointError, match=r"tensor model\.nothing\.weight is missing"):
        Checkpoint(model).read("model.nothing.weight")
