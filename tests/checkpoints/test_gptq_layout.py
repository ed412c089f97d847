"""AutoGPTQ's layout, against an unpacker written here value by value; `make loaders` asks the real loaders."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from compress.architecture import architecture_of
from compress.checkpoints.export import export
from compress.checkpoints.formats import FORMATS
from compress.checkpoints.formats.gptq import BITS, pack, unpack
from compress.checkpoints.reader import Checkpoint
from compress.quantization.grid import dequantize
from compress.quantization.scheme import Scheme
from compress.stages import RoundToNearest
from tests.tiny import apply_stage, our_logits, random_model, random_windows


def value_at(words: list[int], bits: int, index: int) -> int:
    """Value `index` of a column of words: bits index*b to index*b+b-1 of one long little-endian number."""
    stream = sum((word & 0xFFFFFFFF) << (32 * place) for place, word in enumerate(words))
    return (stream >> (index * bits)) & ((1 << bits) - 1)


def weight_of(tensors: dict[str, torch.Tensor], module: str, bits: int, plus: int) -> torch.Tensor:
    """float16 (rows, columns) as an AutoGPTQ-like loader computes it: scale x (q - zero), zero stored less `plus`."""
    qweight, qzeros = tensors[f"{module}.qweight"].tolist(), tensors[f"{module}.qzeros"].tolist()
    scales, groups = tensors[f"{module}.scales"], tensors[f"{module}.g_idx"].tolist()
    rows = scales.shape[1]
    out = torch.empty(rows, len(groups), dtype=scales.dtype)
    for row in range(rows):
        words = [line[row] for line in qweight]
        for column, group in enumerate(groups):
            zero = value_at(qzeros[group], bits, row) + plus
            out[row, column] = (value_at(words, bits, column) - zero) * scales[group, row]
    return out


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    random_model("llama", folder, torch.float16, attention_bias=False, mlp_bias=False, num_hidden_layers=1)
    return folder


def exported(model, tmp_path, **fields):
    done, _ = apply_stage(RoundToNearest(**fields), model, tmp_path / "stage")
    export(done, tmp_path / "export", "gptq", torch.float16, 10**9)
    return done, tmp_path / "export"


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False], ids=["v1", "v2"])
def test_an_independent_unpacker_gives_our_values(model, tmp_path, bits, symmetric):
    done, folder = exported(model, tmp_path, bits=bits, symmetric=symmetric, group_size=32)
    tensors = load_file(folder / "model.safetensors")
    section = json.loads((folder / "quantize_config.json").read_text())

    assert section == json.loads((folder / "config.json").read_text())["quantization_config"]
    assert section["checkpoint_format"] == ("gptq" if symmetric else "gptq_v2")
    for module in ("model.layers.0.self_attn.k_proj", "model.layers.0.mlp.down_proj"):
        ours = dequantize(*done.codes(module))
        assert torch.equal(weight_of(tensors, module, bits, plus=int(symmetric)), ours)


@pytest.mark.parametrize("bits", BITS)
def test_what_is_packed_is_unpacked(bits):
    values = torch.randint(0, 1 << bits, (5, 96), generator=torch.Generator().manual_seed(bits))

    words = pack(values, bits)

    assert words.dtype == torch.int32 and words.shape == (5, 3 * bits)
    assert torch.equal(unpack(words, bits), values)


@pytest.mark.parametrize("fields", [{"bits": 4}, {"bits": 3}, {"bits": 4, "symmetric": False}, {"bits": 8}])
@pytest.mark.parametrize("group", [32, "channel"])
def test_a_checkpoint_is_read_back_code_for_code(model, tmp_path, fields, group):
    done, folder = exported(model, tmp_path, group_size=group, **fields)
    read = Checkpoint(folder)

    assert read.schemes == done.schemes and read.is_understood
    for module in done.schemes:
        (codes, grid), (again, grid_again) = done.codes(module), read.codes(module)
        assert torch.equal(codes, again) and torch.equal(grid.scale, grid_again.scale)
    windows = random_windows(count=2)
    torch.testing.assert_close(our_logits(folder, windows), our_logits(done.folder, windows))


def test_bytes_are_what_the_format_predicts(model, tmp_path):
    for number, scheme in enumerate((Scheme(4, True, 32), Scheme(3, False, 32), Scheme(8, True, None))):
        fields = {"bits": scheme.bits, "symmetric": scheme.symmetric, "group_size": scheme.group_size or "channel"}
        _, folder = exported(model, tmp_path / str(number), **fields)
        read = Checkpoint(folder)
        for module in read.schemes:
            stored = sum(read.tensor_bytes(name) for name in read.module_tensors(module))
            assert stored == FORMATS["gptq"].stored_bytes(scheme, *read.matrix_shape(module), 2)


def test_a_linear_that_stays_dense_in_every_block_is_named_for_loaders(model, tmp_path):
    _, folder = exported(model, tmp_path, bits=4, group_size=32, ignore=("*.o_proj",))
    section = json.loads((folder / "quantize_config.json").read_text())

    assert ["self_attn.o_proj"] not in section["modules_in_block_to_quantize"]
    assert ["mlp.down_proj"] in section["modules_in_block_to_quantize"]
    assert section["dynamic"] == {"-:.*\\.self_attn\\.o_proj$": {}}


@pytest.mark.parametrize(("ignored", "apart"), [("*.k_proj", True), ("*.o_proj", False)])
def test_parts_of_what_vllm_fuses_that_stay_dense_are_an_event(model, tmp_path, ignored, apart):
    done, _ = apply_stage(RoundToNearest(bits=4, group_size=32, ignore=(ignored,)), model, tmp_path / "done")

    written = export(done, tmp_path / "out", "gptq", torch.float16, 10**9)

    assert [event.kind for event in written.events] == ["fused_apart"] * apart
    assert not export(done, tmp_path / "plain", "plain", torch.float16, 10**9).events


@pytest.mark.parametrize(
    ("schemes", "shape", "reason"),
    [
        ([Scheme(5, True, 32)], (64, 64), "its loaders know 2, 3, 4, 8 bits"),
        ([Scheme(4, True, 31)], (64, 341), "64 rows and 341 columns must both divide by 32"),
        ([Scheme(4, True, 32), Scheme(8, True, 32)], (64, 64), "one scheme for the whole model"),
        ([Scheme(4, True, 32), None], (64, 64), "the same linears in every block"),
        ([Scheme(8, True, None, inputs=8)], (64, 64), "its inputs are not"),
    ],
)
def test_what_it_cannot_hold_is_refused_before_work_starts(schemes, shape, reason):
    names = [f"model.layers.{index}.mlp.up_proj" for index in range(len(schemes))]
    given = {name: scheme for name, scheme in zip(names, schemes, strict=True) if scheme}

    (sentence, *_) = FORMATS["gptq"].mistakes(
        given, dict.fromkeys(names, shape), architecture_of({"model_type": "llama"})
    )

    assert reason in sentence


def test_zero_points_of_a_checkpoint_that_calls_itself_symmetric_are_not_lost(model, tmp_path):
    """Others write `sym: true` beside zero points that are not the middle; then it is asymmetric, whatever it says."""
    from safetensors.torch import save_file

    done, folder = exported(model, tmp_path, bits=4, group_size=32)
    tensors = load_file(folder / "model.safetensors")
    odd = "model.layers.0.mlp.up_proj"
    tensors[f"{odd}.qzeros"] = torch.full_like(tensors[f"{odd}.qzeros"], 0x66666666)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    read = Checkpoint(folder)

    assert not read.schemes[odd].symmetric and read.schemes["model.layers.0.mlp.gate_proj"].symmetric
    ours = dequantize(*read.codes(odd))
    assert torch.equal(ours, weight_of(tensors, odd, 4, plus=1))
    again = export(read, tmp_path / "plain", "plain", torch.float16, 10**9)
    assert again.bytes and torch.equal(Checkpoint(tmp_path / "plain").dense(odd), ours)
    assert done.schemes[odd].symmetric


def test_older_loaders_find_the_rotary_base_where_they_look_for_it(tmp_path):
    rope = {"rope_type": "default", "rope_theta": 123456.0}
    random_model("llama", tmp_path / "model", torch.float16, attention_bias=False, mlp_bias=False, rope_parameters=rope)
    _, folder = exported(tmp_path / "model", tmp_path, bits=4, group_size=32)
    config = json.loads((folder / "config.json").read_text())

    assert config["rope_theta"] == 123456.0 and config["torch_dtype"] == "float16"
    from transformers import AutoConfig

    read = AutoConfig.from_pretrained(folder)
    assert read.rope_parameters["rope_theta"] == 123456.0
