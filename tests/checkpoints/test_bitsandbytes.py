"""What bitsandbytes loads: its own functions and transformers' loader are the oracles."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from compress.checkpoints.export import export
from compress.checkpoints.formats import FORMATS, able
from compress.checkpoints.formats.bitsandbytes import pack, unpack, without_cpu_kernel
from compress.checkpoints.reader import Checkpoint
from compress.quantization.grid import FLOATING_GRIDS, dequantize
from compress.quantization.scheme import Scheme
from compress.stages.bitsandbytes import BitsAndBytesStage, quantise
from tests.tiny import apply_stage, load_publicly, our_logits, random_model, random_windows, their_logits

bitsandbytes = pytest.importorskip("bitsandbytes")
KINDS = [("nf4", False), ("nf4", True), ("fp4", False), ("fp4", True)]
SIZES = {"hidden_size": 64, "intermediate_size": 128, "attention_bias": False, "mlp_bias": False}


def exported(tmp_path, **fields):
    random_model("llama", tmp_path / "model", **SIZES)
    done, outcome = apply_stage(BitsAndBytesStage(**fields), tmp_path / "model", tmp_path / "stage")
    export(done, tmp_path / "export", "bitsandbytes", torch.float16, 10**9)
    return done, tmp_path / "export", outcome


@pytest.mark.parametrize("grid", ["nf4", "fp4"])
def test_tables_are_the_librarys(grid):
    theirs = bitsandbytes.functional.get_4bit_type(grid, "cpu")
    torch.testing.assert_close(FLOATING_GRIDS[grid], theirs, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("grid", "nested"), KINDS)
def test_values_are_what_the_library_makes_of_its_own_codes(grid, nested):
    weight = torch.randn(96, 128, generator=torch.Generator().manual_seed(3))
    functional = bitsandbytes.functional
    theirs = functional.dequantize_4bit(
        *functional.quantize_4bit(weight, quant_type=grid, compress_statistics=nested, blocksize=64)
    )

    ours = dequantize(*quantise(weight, Scheme(4, True, 64, grid=grid, nested=nested)))

    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("grid", "nested"), KINDS)
def test_four_bits_load_in_transformers_with_our_logits(tmp_path, grid, nested):
    done, folder, _ = exported(tmp_path, type=grid, double_quant=nested)
    windows = random_windows(count=2)

    read = Checkpoint(folder)

    assert read.schemes == done.schemes and read.is_understood
    ours = our_logits(folder, windows)
    torch.testing.assert_close(ours, our_logits(done.folder, windows), atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(their_logits(load_publicly(folder), windows), ours, atol=2e-2, rtol=2e-2)
    for module in read.schemes:
        stored = sum(read.tensor_bytes(name) for name in read.module_tensors(module))
        predicted = FORMATS["bitsandbytes"].stored_bytes(read.schemes[module], *read.matrix_shape(module), 2)
        assert abs(stored - predicted) < 8, "all but the digits of a number in the state's text"


@pytest.mark.skipif(not bitsandbytes.functional.has_avx512bf16(), reason="this CPU has no AVX512-BF16")
def test_the_kernel_for_avx512_bf16_computes_the_same_but_for_bfloat16(tmp_path):
    """As users on such CPUs load it: nothing is told to the library."""
    from transformers import AutoModelForCausalLM

    _, folder, _ = exported(tmp_path, type="nf4")
    windows = random_windows(count=2)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()

    theirs, ours = their_logits(model, windows), our_logits(folder, windows)

    assert 1e-4 < float((theirs - ours).square().mean().sqrt() / ours.square().mean().sqrt()) < 2e-2


def test_the_kernel_is_left_off_everywhere_or_only_where_it_would_stop():
    """As if this CPU had AVX512-BF16, whose kernel takes 32 rows at a time."""

    def built():
        model = torch.nn.ModuleList(torch.nn.Linear(8, rows) for rows in (64, 33))
        for linear in model:
            linear.support_avx512bf16_for_cpu = True
        return model

    everywhere, where_it_stops = built(), built()

    assert without_cpu_kernel(everywhere) and without_cpu_kernel(where_it_stops, where_it_stops=True)
    assert [linear.support_avx512bf16_for_cpu for linear in everywhere] == [False, False]
    assert [linear.support_avx512bf16_for_cpu for linear in where_it_stops] == [True, False]
    assert not without_cpu_kernel(everywhere) and not without_cpu_kernel(torch.nn.Linear(8, 33))


def test_codes_are_read_back_as_they_were_written(tmp_path):
    done, folder, _ = exported(tmp_path, type="nf4")
    read = Checkpoint(folder)

    for module in done.schemes:
        (codes, grid), (again, grid_again) = done.codes(module), read.codes(module)
        assert torch.equal(codes, again)
        torch.testing.assert_close(grid.scale, grid_again.scale, rtol=1e-6, atol=0)


def test_what_is_packed_is_unpacked():
    codes = torch.randint(0, 16, (6, 10), generator=torch.Generator().manual_seed(0)).to(torch.int8)

    assert pack(codes)[0].item() == 16 * codes[0, 0] + codes[0, 1]
    assert torch.equal(unpack(pack(codes), 6, 10), codes)


def test_llm_int8_loads_in_transformers_and_computes_with_integers(tmp_path):
    done, folder, _ = exported(tmp_path, type="int8", threshold=2.0)
    windows = random_windows(count=2)
    ours, theirs = our_logits(folder, windows), their_logits(load_publicly(folder), windows)

    assert Checkpoint(folder).schemes == done.schemes
    torch.testing.assert_close(theirs, ours, atol=3e-2, rtol=3e-2)
    dense = export(done, tmp_path / "dense", "plain", torch.float16, 10**9)
    assert dense.bytes > 0
    assert (ours - our_logits(tmp_path / "dense", windows)).abs().max() > 1e-3, "inputs were not rounded"


def test_a_model_that_the_library_saved_is_read_with_its_logits(tmp_path):
    """The other way round: transformers quantises and saves, and we read."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    random_model("llama", tmp_path / "model", **SIZES)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model", quantization_config=config, dtype=torch.float32)
    theirs.save_pretrained(tmp_path / "saved")
    windows = random_windows(count=2)

    read = Checkpoint(tmp_path / "saved")
    without_cpu_kernel(theirs)

    assert read.is_understood and len(read.schemes) == 14
    torch.testing.assert_close(
        our_logits(tmp_path / "saved", windows), their_logits(theirs.eval(), windows), atol=1e-3, rtol=1e-3
    )


def test_saved_files_are_the_same_whether_or_not_the_model_ran_before(tmp_path):
    """The trap: what a library's model is saved as after a forward on the CPU. Ours is written from the codes."""
    done, folder, _ = exported(tmp_path, type="nf4")
    before = load_file(folder / "model.safetensors")

    their_logits(load_publicly(folder), random_windows(count=1))
    export(done, tmp_path / "again", "bitsandbytes", torch.float16, 10**9)

    after = load_file(tmp_path / "again" / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_ignored_linears_stay_dense_and_are_said(tmp_path):
    done, folder, outcome = exported(tmp_path, type="nf4", ignore=("*.down_proj",))

    assert not any("down_proj" in module for module in done.schemes)
    assert [event.where for event in outcome.events] == [f"model.layers.{i}.mlp.down_proj" for i in (0, 1)]
    skipped = Checkpoint(folder).config["quantization_config"]["llm_int8_skip_modules"]
    assert "model.layers.0.mlp.down_proj" in skipped and "lm_head" in skipped


def test_only_its_own_format_and_plain_can_hold_it():
    scheme = Scheme(4, True, 64, grid="nf4")
    from compress.architecture import architecture_of

    names = {"model.layers.0.mlp.up_proj": (64, 64)}
    assert able(dict.fromkeys(names, scheme), names, architecture_of({"model_type": "llama"})) == [
        "bitsandbytes",
        "plain",
    ]
