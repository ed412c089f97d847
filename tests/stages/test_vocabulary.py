"""Embedding and head as integers: the same function for all who read them, in the bytes that `plan` says."""

from __future__ import annotations

import gguf
import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig

from compress.architecture import architecture_of
from compress.checkpoints.export import export
from compress.checkpoints.formats import FORMATS, able
from compress.checkpoints.reader import Checkpoint
from compress.memory import predict
from compress.quantization.grid import dequantize
from compress.quantization.scheme import Scheme
from compress.stages import Gptq, Recover, RoundToNearest, Vocabulary
from compress.steps.shapes import Shape
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

BARE = {"attention_bias": False, "mlp_bias": False}


def shape_of(checkpoint: Checkpoint) -> Shape:
    return Shape({key: value for key, value in checkpoint.config.items() if key != "quantization_config"})


@pytest.mark.parametrize("name", CONFIGS)
def test_every_architecture_keeps_its_function_at_8_bits_and_its_other_tensors_as_they_are(tmp_path, name):
    random_model(name, tmp_path / "model", torch.float16)
    windows = random_windows()
    before = our_logits(tmp_path / "model", windows)

    done, outcome = apply_stage(Vocabulary(), tmp_path / "model", tmp_path / "stage")

    arch, tied = done.architecture, config_of(name).tie_word_embeddings
    assert set(done.schemes) == ({arch.embedding} if tied else {arch.embedding, arch.head})
    assert done.tied_head == tied
    assert [record["name"] for record in outcome.modules] == list(shape_of(done).vocabulary)
    assert all(record["error"] < 6e-5 and record["block"] is None for record in outcome.modules)
    after = our_logits(tmp_path / "stage", windows)
    assert 0 < float((after - before).square().mean()) < 0.02**2 * float(before.square().mean())
    source = Checkpoint(tmp_path / "model")
    for tensor in source.names:
        if tensor.rpartition(".")[0] not in done.schemes:
            assert torch.equal(done.read(tensor), source.read(tensor))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [3, 8])
def test_rows_are_rounded_alone_and_match_rounding_of_a_linear(tmp_path, bits, symmetric, monkeypatch):
    """The same grid search as round_to_nearest's, whatever is rounded at once."""
    from compress.quantization.gptq import rounded
    from compress.stages import vocabulary

    random_model("llama", tmp_path / "model", torch.float16)
    monkeypatch.setattr(vocabulary, "ROWS", 7)
    stage = Vocabulary(bits=bits, symmetric=symmetric, group_size=32)

    done, outcome = apply_stage(stage, tmp_path / "model", tmp_path / "stage")

    weight = Checkpoint(tmp_path / "model").read("lm_head.weight").float()
    whole = rounded(weight, None, Scheme(bits, symmetric, 32), torch.float16, "mse")
    codes, grid = done.codes("lm_head")
    assert torch.equal(codes, whole.codes) and torch.equal(grid.scale, whole.grid.scale)
    assert outcome.modules[1]["error"] == pytest.approx(whole.error, rel=1e-4)


@pytest.mark.parametrize(("parts", "names"), [("embedding", {"model.embed_tokens"}), ("head", {"lm_head"})])
def test_one_part_alone(tmp_path, parts, names):
    random_model("llama", tmp_path / "model", torch.float16)
    done, _ = apply_stage(Vocabulary(parts=parts), tmp_path / "model", tmp_path / "stage")
    assert set(done.schemes) == names


@pytest.mark.parametrize("first", [True, False])
def test_it_goes_before_or_after_stages_that_quantise_and_train(tmp_path, first):
    random_model("llama", tmp_path / "model", torch.float16)
    windows = random_windows(8)
    stages = [Gptq(bits=4, group_size=32), Recover(epochs=1)]
    stages.insert(0 if first else 2, Vocabulary())
    folder = tmp_path / "model"
    for index, stage in enumerate(stages):
        done, _ = apply_stage(stage, folder, tmp_path / f"{index}", windows, origin=tmp_path / "model")
        folder = tmp_path / f"{index}"

    assert {"model.embed_tokens", "lm_head", "model.layers.0.mlp.up_proj"} <= set(done.schemes)
    assert len(done.schemes) == 2 + 2 * len(done.architecture.linears)
    values = dequantize(*done.codes("lm_head")).float()
    source = Checkpoint(tmp_path / "model").read("lm_head.weight").float()
    assert float((values - source).square().sum() / source.square().sum()) < 6e-5


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_gguf_holds_both_kinds_and_its_readers_agree(tmp_path, tied, bits):
    random_model("llama", tmp_path / "model", torch.float16, tie_word_embeddings=tied, **BARE)
    stage = Vocabulary(bits=bits, group_size=32)
    done, _ = apply_stage(stage, tmp_path / "model", tmp_path / "stage")
    done, _ = apply_stage(RoundToNearest(bits=4, group_size=32), tmp_path / "stage", tmp_path / "both")
    shape = shape_of(done)

    written = export(done, tmp_path / "export", "gguf", torch.float16, 10**9)

    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(str(tmp_path / "export" / "model.gguf")).tensors}
    assert ("output.weight" in tensors) != tied
    kind = {4: "Q4_0", 8: "Q8_0"}[bits]
    for name, module in (("token_embd.weight", "model.embed_tokens"), ("output.weight", "lm_head"))[: 1 if tied else 2]:
        assert tensors[name].tensor_type.name == kind
        values = torch.from_numpy(gguf.dequantize(tensors[name].data, tensors[name].tensor_type))
        assert torch.equal(values.half().float(), dequantize(*done.codes(module)).float())
    size = predict.stored_bytes(shape.tensors, shape.everything, done.schemes, 2, FORMATS["gguf"])
    assert written.bytes == size


@pytest.mark.parametrize("same", [True, False])
def test_a_head_in_compressed_tensors_reloads_with_our_logits(tmp_path, same):
    random_model("llama", tmp_path / "model", torch.float16, **BARE)
    windows = random_windows()
    apply_stage(Vocabulary(parts="head", group_size=32), tmp_path / "model", tmp_path / "stage")
    linears = RoundToNearest(bits=8 if same else 4, group_size=32)
    done, _ = apply_stage(linears, tmp_path / "stage", tmp_path / "both")
    shape = shape_of(done)

    written = export(done, tmp_path / "export", "compressed-tensors", torch.float16, 10**9)

    again = Checkpoint(tmp_path / "export")
    assert again.schemes == done.schemes and not again.tied_head
    assert torch.equal(again.codes("lm_head")[0], done.codes("lm_head")[0])
    format_ = FORMATS["compressed-tensors"]
    assert written.bytes == predict.stored_bytes(shape.tensors, shape.everything, done.schemes, 2, format_)
    section = again.config["quantization_config"]
    QuantizationConfig.model_validate(section)
    assert "lm_head" not in section["ignore"] and len(section["config_groups"]) == (1 if same else 2)
    # vLLM finds the scheme of a head by its name only: to it, a head is no "Linear".
    assert any("re:^lm_head$" in group["targets"] for group in section["config_groups"].values())
    ours = our_logits(tmp_path / "both", windows)
    theirs = their_logits(load_publicly(tmp_path / "export"), windows)
    assert float((ours - theirs).abs().max()) < 1e-3


def test_formats_that_cannot_say_so_and_those_that_can_are_named(tmp_path):
    config = config_of("llama", **BARE)
    shapes = {"model.embed_tokens": (160, 64)}
    schemes = {"model.embed_tokens": Scheme(8, True, 32)}
    arch = architecture_of(config)

    assert "the head is tied to it" in FORMATS["compressed-tensors"].mistakes(schemes, shapes, arch)[0]
    assert "keeps embedding and head in 16 bits" in FORMATS["gptq"].mistakes(schemes, shapes, arch)[0]
    assert able(schemes, shapes, arch) == ["gguf", "plain"]
    untied = {**shapes, "lm_head": (160, 64)}
    assert "use parts: head" in FORMATS["compressed-tensors"].mistakes(schemes, untied, arch)[0]
    assert able({"lm_head": Scheme(8, True, 32)}, untied, arch) == ["compressed-tensors", "gguf", "plain"]


def test_groups_and_parts_that_do_not_fit_are_told_before_work_starts():
    shapes = {"model.embed_tokens": (160, 48)}
    (said,) = Vocabulary(group_size=32).check(shapes, architecture_of(config_of("llama")))
    assert "model.embed_tokens: 48 columns do not divide into groups of 32" in said and "channel" in said
    (said,) = Vocabulary(parts="head", group_size=16).check(shapes, architecture_of(config_of("llama")))
    assert "tied to its embedding" in said


def test_gpt2s_matrices_are_written_out_as_it_keeps_them(tmp_path):
    """Linears of GPT-2 lie with their inputs first; its embedding does not."""
    random_model("gpt2", tmp_path / "model", torch.float16)
    windows = random_windows()
    apply_stage(Vocabulary(), tmp_path / "model", tmp_path / "stage")
    done, _ = apply_stage(RoundToNearest(bits=8, group_size=32), tmp_path / "stage", tmp_path / "both")

    export(done, tmp_path / "export", "plain", torch.float16, 10**9)

    ours, theirs = our_logits(tmp_path / "both", windows), their_logits(load_publicly(tmp_path / "export"), windows)
    assert float((ours - theirs).abs().max()) < 1e-3
