"""Packing, against two independent readers: one written here bit by bit, and the compressed-tensors library's own."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from compress.checkpoints.export import export
from compress.checkpoints.formats.compressed_tensors import packed, quantization_config, schemes_by_target
from compress.checkpoints.reader import Checkpoint
from compress.quantization.grid import dequantize
from compress.quantization.scheme import BITS, Scheme
from compress.stages import RoundToNearest
from tests.tiny import apply_stage, load_publicly, our_logits, random_model, random_windows, their_logits

ODD = {
    "hidden_size": 20,
    "intermediate_size": 37,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "attention_bias": False,
    "mlp_bias": False,
}
"""20 columns, 37 columns, 10 and 37 rows: no row fills its last 32-bit word."""


def unpack_bits(words: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """Codes (rows, columns) from int32 words (rows, n): value i is bits i*b to i*b+b-1, offset by 2^(b-1)."""
    rows = []
    for row in words.tolist():
        stream = 0
        for position, word in enumerate(row):
            stream |= (word & 0xFFFFFFFF) << (32 * position)
        rows.append([((stream >> (bits * i)) & ((1 << bits) - 1)) - (1 << (bits - 1)) for i in range(columns)])
    return torch.tensor(rows)


@pytest.fixture(scope="module")
def odd_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("odd")
    random_model("llama", folder, **ODD)
    return folder


def _exported(model, tmp_path, stage):
    checkpoint, _ = apply_stage(stage, model, tmp_path / "stage")
    export(checkpoint, tmp_path / "export", "compressed-tensors", torch.float16, 10**9)
    return checkpoint, tmp_path / "export"


def _stage(bits: int, symmetric: bool) -> RoundToNearest:
    """Groups of 4, and one scale a row for the 37 columns of down_proj."""
    down = {"match": "*.down_proj", "group_size": "channel"}
    return RoundToNearest(bits=bits, symmetric=symmetric, group_size=4, overrides=(down,))


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", BITS)
def test_packing_round_trips_odd_widths(odd_model, tmp_path, bits, symmetric):
    checkpoint, folder = _exported(odd_model, tmp_path, _stage(bits, symmetric))
    packed, read = load_file(folder / "model.safetensors"), Checkpoint(folder)

    assert read.schemes == checkpoint.schemes
    for module, scheme in checkpoint.schemes.items():
        codes, grid = checkpoint.codes(module)
        rows, columns = codes.shape
        assert packed[f"{module}.weight_shape"].tolist() == [rows, columns]
        assert torch.equal(unpack_bits(packed[f"{module}.weight_packed"], bits, columns), codes.long())
        assert torch.equal(packed[f"{module}.weight_scale"], grid.scale)
        if not symmetric:
            zeros = unpack_bits(packed[f"{module}.weight_zero_point"].T, bits, rows).T
            assert torch.equal(zeros, grid.zero.long())
        again, grid_again = read.codes(module)
        assert torch.equal(again, codes) and grid_again.scheme == scheme


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", BITS)
def test_the_librarys_decompressor_gives_our_values(odd_model, tmp_path, bits, symmetric):
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationScheme

    checkpoint, folder = _exported(odd_model, tmp_path, _stage(bits, symmetric))
    packed = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())["quantization_config"]

    for module, scheme in checkpoint.schemes.items():
        (group,) = [
            group
            for group in config["config_groups"].values()
            if (group["weights"]["group_size"] or None) == scheme.group_size
        ]
        state = {
            name.removeprefix(module + "."): tensor for name, tensor in packed.items() if name.startswith(module + ".")
        }
        given = {key: value for key, value in group.items() if key != "format"}
        theirs = PackedQuantizationCompressor.decompress(state, QuantizationScheme(**given))["weight"]
        assert torch.equal(theirs, dequantize(*checkpoint.codes(module)))


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", BITS)
def test_every_width_loads_in_transformers_with_our_logits(odd_model, tmp_path, bits, symmetric):
    """Asymmetric schemes load only where all modules share one: see `cannot_load`."""
    stage = _stage(bits, symmetric) if symmetric else RoundToNearest(bits=bits, symmetric=False, group_size="channel")
    _, folder = _exported(odd_model, tmp_path, stage)
    windows = random_windows(count=2, tokens=12)

    ours, theirs = our_logits(folder, windows), their_logits(load_publicly(folder), windows)

    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_mixed_schemes_and_ignored_modules_load_in_transformers(tmp_path):
    random_model("llama", tmp_path / "model", num_hidden_layers=3)
    stage = RoundToNearest(
        bits=4,
        group_size=32,
        ignore=("model.layers.1.mlp.*",),
        overrides=(
            {"match": "*.down_proj", "bits": 8, "group_size": "channel"},
            {"match": r"re:model\.layers\.2\.self_attn\.(q|k|v)_proj", "bits": 3},
        ),
    )
    checkpoint, folder = _exported(tmp_path / "model", tmp_path, stage)
    windows = random_windows(count=2)

    assert len(set(checkpoint.schemes.values())) == 3
    assert "model.layers.1.mlp.up_proj" not in checkpoint.schemes
    assert Checkpoint(folder).schemes == checkpoint.schemes
    torch.testing.assert_close(
        our_logits(folder, windows), their_logits(load_publicly(folder), windows), atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("group_size", [32, "channel"])
def test_an_asymmetric_scheme_with_ignored_modules_loads_in_transformers(tmp_path, group_size):
    random_model("llama", tmp_path / "model", num_hidden_layers=3)
    stage = RoundToNearest(bits=4, symmetric=False, group_size=group_size, ignore=("model.layers.1.*",))
    _, folder = _exported(tmp_path / "model", tmp_path, stage)
    windows = random_windows(count=2)

    torch.testing.assert_close(
        our_logits(folder, windows), their_logits(load_publicly(folder), windows), atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("columns", [64, 72, 96])
@pytest.mark.parametrize("bits", BITS)
def test_our_packing_is_the_librarys_to_the_bit(bits, columns):
    """Also where rows are more than are packed at a time, and where a word is not full."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    generator = torch.Generator().manual_seed(bits)
    low, high = -(1 << (bits - 1)), 1 << (bits - 1)
    codes = torch.randint(low, high, (600, columns), generator=generator).to(torch.int8)

    assert torch.equal(packed(codes, bits), pack_to_int32(codes, bits))
    assert torch.equal(packed(codes, bits, along=0), pack_to_int32(codes, bits, packed_dim=0))


def test_stored_bytes_are_what_a_scheme_predicts(odd_model, tmp_path):
    for bits in BITS:
        for symmetric in (True, False):
            _, folder = _exported(odd_model, tmp_path / f"{bits}{symmetric}", _stage(bits, symmetric))
            read = Checkpoint(folder)
            for module, scheme in read.schemes.items():
                rows, columns = read.read(f"{module}.weight_shape").tolist()
                stored = sum(read.tensor_bytes(name) for name in read.module_tensors(module))
                assert stored == scheme.stored_bytes(rows, columns)


def test_patterns_fold_blocks_and_find_each_module_again():
    schemes = {f"model.layers.{block}.mlp.up_proj": Scheme(4, True, 64) for block in range(12)}
    schemes |= {f"model.layers.{block}.mlp.down_proj": Scheme(8, False, None) for block in (0, 1, 10)}

    config = quantization_config(schemes, ["lm_head"])

    targets = [target for group in config["config_groups"].values() for target in group["targets"]]
    assert r"re:^model\.layers\.(0|1|10)\.mlp\.down_proj$" in targets
    assert config["ignore"] == ["lm_head"]
    assert schemes_by_target(config, schemes) == schemes
