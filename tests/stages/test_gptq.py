"""The GPTQ stage on small models: true-sequential statistics, resuming, events, and agreement with the solver."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.checkpoints.reader import Checkpoint
from compress.events import count_by_kind
from compress.quantization.factor import factorise
from compress.quantization.gptq import solve
from compress.quantization.grid import dequantize
from compress.quantization.scheme import Scheme
from compress.stages import Gptq, RoundToNearest
from compress.stages.gptq import kernel_events
from tests.tiny import CPU, apply_stage, our_logits, random_model, random_windows, stage_context, their_logits


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    random_model("llama", folder, num_hidden_layers=3)
    return folder


WINDOWS = random_windows(count=24)


def test_codes_are_those_of_the_solver_on_inputs_of_an_already_compressed_model(model, tmp_path):
    """o_proj of block 1, from a plain forward of a model whose block 0 and q/k/v of block 1 are replaced by hand."""
    from transformers import AutoModelForCausalLM

    stage = Gptq(bits=4, group_size=32, quality="fast", output_tokens=0)
    done, _ = apply_stage(stage, model, tmp_path / "stage", WINDOWS)
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    earlier = [f"model.layers.0.{name}" for name in done.architecture.linears]
    earlier += [f"model.layers.1.self_attn.{name}_proj" for name in "qkv"]
    for name in earlier:
        plain.get_submodule(name).weight.data = done.dense(name).float()
    rows = []
    target = plain.get_submodule("model.layers.1.self_attn.o_proj")
    target.register_forward_pre_hook(lambda module, args: rows.append(args[0].flatten(0, 1).double()))
    their_logits(plain, WINDOWS)
    inputs = torch.cat(rows)
    hessian = inputs.T @ inputs / len(inputs)

    weight = target.weight.data.float()
    (expected,) = solve([weight], hessian, factorise(hessian, 0.01), Scheme(4, True, 32), torch.float16)

    codes, grid = done.codes("model.layers.1.self_attn.o_proj")
    assert (codes == expected.codes).float().mean() > 0.99
    torch.testing.assert_close(grid.scale.float(), expected.grid.scale.float(), rtol=2e-2, atol=0)


def test_gptq_stays_closer_to_the_source_than_rounding(model, tmp_path):
    source = our_logits(model, random_windows(seed=99)).log_softmax(-1)
    distances = {}
    for name, stage in (
        ("rounding", RoundToNearest(bits=3, group_size=32)),
        ("gptq", Gptq(bits=3, group_size=32, quality="fast")),
    ):
        apply_stage(stage, model, tmp_path / name, random_windows(count=64))
        logits = our_logits(tmp_path / name, random_windows(seed=99)).log_softmax(-1)
        distances[name] = float((source.exp() * (source - logits)).sum(-1).mean())

    assert distances["gptq"] < 0.9 * distances["rounding"]


@pytest.mark.parametrize(("stop_after", "low_memory"), [(0, False), (1, False), (1, True)])
def test_a_stage_stopped_after_a_block_goes_on_to_the_same_bytes(model, tmp_path, stop_after, low_memory):
    stage = Gptq(group_size=32, low_memory=low_memory)
    whole, outcome = apply_stage(stage, model, tmp_path / "whole", WINDOWS)
    solved = []

    def context(after_block):
        return stage_context(model, tmp_path / "stopped", WINDOWS, after_block=after_block)

    def stop(index):
        if index == stop_after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stage.apply(context(stop))
    again = stage.apply(context(solved.append))

    assert solved == list(range(stop_after + 1, 3)), "finished blocks are not solved again"
    assert [_without_seconds(module) for module in again.modules] == [
        _without_seconds(module) for module in outcome.modules
    ]
    for path in sorted((tmp_path / "whole").glob("*.safetensors")):
        assert path.read_bytes() == (tmp_path / "stopped" / path.name).read_bytes(), path.name
    assert whole.names == Checkpoint(tmp_path / "stopped").names


@pytest.mark.parametrize("low_memory", [False, True], ids=["held", "replayed"])
def test_products_in_bfloat16_stop_at_the_statistics(model, tmp_path, monkeypatch, low_memory):
    """The forward is in mixed precision, what looks at it and solves is not, and the result is nearly as good."""
    from compress.stages import gptq_block

    seen = []
    original = gptq_block.BlockWork.on_input
    monkeypatch.setattr(
        gptq_block.BlockWork,
        "on_input",
        lambda self, group, number, here, there: (
            seen.append((here.inputs.dtype, torch.is_autocast_enabled("cpu"))),
            original(self, group, number, here, there),
        )[1],
    )
    windows, errors = random_windows(count=64), {}
    for dtype in ("float32", "bfloat16"):
        stage = Gptq(bits=3, group_size=32, products=dtype, low_memory=low_memory)
        _, outcome = apply_stage(stage, model, tmp_path / dtype, windows)
        errors[dtype] = sum(module["error"] for module in outcome.modules)
        kinds = {kind for kind, _ in seen}
        assert (torch.bfloat16 in kinds) == (dtype == "bfloat16")
        assert not any(mixed for _, mixed in seen) and not torch.is_autocast_enabled("cpu")
        seen.clear()
    assert errors["bfloat16"] == pytest.approx(errors["float32"], rel=0.05)
    assert errors["bfloat16"] != errors["float32"]


def test_low_memory_gives_the_same_bytes(model, tmp_path):
    windows = random_windows(count=48)  # enough tokens that targets are shifted
    _, outcome = apply_stage(Gptq(group_size=32), model, tmp_path / "held", windows)
    _, replayed = apply_stage(Gptq(group_size=32, low_memory=True), model, tmp_path / "replayed", windows)

    assert [_without_seconds(each) for each in replayed.modules] == [_without_seconds(each) for each in outcome.modules]
    for path in sorted((tmp_path / "held").glob("*.safetensors")):
        assert path.read_bytes() == (tmp_path / "replayed" / path.name).read_bytes(), path.name
    assert not replayed.events, "every target was shifted"


def _without_seconds(module):
    return {key: value for key, value in module.items() if key != "seconds"}


def test_padding_never_enters_the_statistics(model, tmp_path):
    """Right padding of other token ids changes nothing."""
    from compress.calibration.windows import Windows

    windows = random_windows(count=12, padded=True)
    other = Windows(windows.ids + (1 - windows.mask) * 77, windows.mask, windows.ledger)
    for name, each in (("zeros", windows), ("others", other)):
        apply_stage(Gptq(group_size=32), model, tmp_path / name, each)

    first, second = (load_file(tmp_path / name / "block-00002.safetensors") for name in ("zeros", "others"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_ignored_modules_are_kept_as_they_are_and_said_so(model, tmp_path):
    stage = Gptq(group_size=32, ignore=("model.layers.1.*",), overrides=({"match": "*.o_proj", "bits": 8},))

    done, outcome = apply_stage(stage, model, tmp_path / "stage", WINDOWS)

    source = Checkpoint(model)
    for name in source.module_tensors("model.layers.1"):
        assert torch.equal(done.read(name), source.read(name))
    kept = [event.where for event in outcome.events if event.kind == "module_kept"]
    assert kept == [f"model.layers.1.{name}" for name in done.architecture.linears]
    assert done.schemes["model.layers.0.self_attn.o_proj"].bits == 8


def test_a_channel_the_data_never_excites_is_an_event_and_still_rounded(model, tmp_path):
    damaged = tmp_path / "model"
    damaged.mkdir()
    (damaged / "config.json").write_text((model / "config.json").read_text())
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.input_layernorm.weight"][5] = 0
    save_file(tensors, damaged / "model.safetensors")

    done, outcome = apply_stage(Gptq(group_size=32), damaged, tmp_path / "stage", WINDOWS)

    (event,) = [event for event in outcome.events if event.kind == "dead_columns"]
    assert event.where == "model.layers.0.self_attn.q_proj+self_attn.k_proj+self_attn.v_proj"
    assert event.data["columns"] == 1
    column = dequantize(*done.codes("model.layers.0.self_attn.q_proj"))[:, 5].float()
    expected = tensors["model.layers.0.self_attn.q_proj.weight"][:, 5]
    assert float((column - expected).abs().max()) < 0.1 and bool(column.any())


def test_inputs_that_are_not_finite_fall_back_to_rounding_with_an_event(model, tmp_path):
    """An overflow inside a block, as float16 models have: the run goes on, and the report says what happened."""
    damaged = tmp_path / "model"
    damaged.mkdir()
    (damaged / "config.json").write_text((model / "config.json").read_text())
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.gate_proj.weight"] *= 1e25
    tensors["model.layers.1.mlp.up_proj.weight"] *= 1e25
    save_file(tensors, damaged / "model.safetensors")

    done, outcome = apply_stage(Gptq(group_size=32), damaged, tmp_path / "stage", WINDOWS, stored=torch.float32)

    where = [event.where for event in outcome.events if event.kind == "rounding_fallback"]
    assert "model.layers.1.mlp.down_proj" in where
    assert any(event.kind == "outputs_skipped" for event in outcome.events), "gradients overflow as well"
    records = {record["name"]: record for record in outcome.modules}
    assert records["model.layers.1.mlp.down_proj"]["damping"] is None
    assert records["model.layers.1.mlp.down_proj"]["events"] == ["rounding_fallback"]
    assert records["model.layers.0.mlp.down_proj"]["damping"] == 0.01
    assert "model.layers.1.mlp.down_proj" in done.schemes


def test_too_few_tokens_are_events(model, tmp_path):
    _, outcome = apply_stage(Gptq(group_size=32), model, tmp_path / "stage", random_windows(count=1))

    counts = count_by_kind(outcome.events)
    assert counts["few_calibration_tokens"] == 1
    assert counts["target_shift_skipped"] > 0
    assert counts["refinement_skipped"] == 1, "a batch cannot judge what was computed from it"


def test_a_quality_fills_in_the_fields_that_are_not_given():
    assert Gptq(quality="fast").activation_streams == 1 and not Gptq(quality="fast").refine
    assert Gptq().activation_streams == 1.5 and Gptq().refine and not Gptq().token_weights
    assert Gptq(quality="max").activation_streams == 2 and Gptq(quality="max").token_weights
    assert Gptq(quality="max", token_weights=False).shift_share == 1
    assert not Gptq(quality="max", token_weights=False).token_weights
    resolved = Gptq(quality="fast").model_dump()
    assert Gptq.model_validate(resolved) == Gptq(quality="fast")


def test_better_qualities_stay_closer_to_the_source(model, tmp_path):
    source = our_logits(model, random_windows(seed=99)).log_softmax(-1)
    distances = {}
    for quality in ("fast", "balanced", "max"):
        stage = Gptq(bits=3, group_size=32, quality=quality)
        apply_stage(stage, model, tmp_path / quality, random_windows(count=96))
        logits = our_logits(tmp_path / quality, random_windows(seed=99)).log_softmax(-1)
        distances[quality] = float((source.exp() * (source - logits)).sum(-1).mean())

    assert distances["balanced"] < distances["fast"]
    assert distances["max"] < distances["fast"]


def test_a_refinement_is_kept_only_where_held_out_windows_agree(model, tmp_path, monkeypatch):
    """With every refinement made worse on purpose, none is kept and the result is that without refining."""
    from compress.quantization import gptq

    windows = random_windows(count=48)
    apply_stage(Gptq(group_size=32, refine=False), model, tmp_path / "plain", windows)
    _, kept = apply_stage(Gptq(group_size=32), model, tmp_path / "refined", windows)
    worse = lambda target, codes, grid, swept: (torch.zeros_like(codes), grid)  # noqa: E731
    monkeypatch.setattr(gptq, "refined", worse)
    _, refused = apply_stage(Gptq(group_size=32), model, tmp_path / "refused", windows)

    assert any(record["refined"] for record in kept.modules)
    assert not any(record["refined"] for record in refused.modules)
    first, second = (load_file(tmp_path / name / "block-00001.safetensors") for name in ("plain", "refused"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_device_whose_columns_torch_rounds_is_one_event(monkeypatch):
    monkeypatch.setattr("compress.quantization.gpu.find_spec", lambda name: None)
    monkeypatch.setattr("compress.quantization.columns.has_numba", lambda: False)

    for device, package in ((torch.device("cuda"), "triton"), (CPU, "numba")):
        (event,) = kernel_events(device)
        assert event.kind == "torch_columns" and package in event.message
    monkeypatch.setattr("compress.quantization.columns.has_numba", lambda: True)
    assert kernel_events(CPU) == []


def test_every_record_says_what_was_done(model, tmp_path):
    _, outcome = apply_stage(Gptq(bits=3, symmetric=False, group_size=32), model, tmp_path / "stage", WINDOWS)

    assert len(outcome.modules) == 21
    for record in outcome.modules:
        assert record["scheme"] == "int3 asymmetric group 32"
        assert 0 < record["error"] <= record["rounding_error"]
        assert record["effective_bits"] > 3
    assert set(outcome.seconds_by_part) == {"read", "outputs", "forward", "hessian", "factorise", "solve", "write"}


def test_rounding_a_quantised_checkpoint_again_keeps_what_the_second_stage_ignores(model, tmp_path):
    first, _ = apply_stage(RoundToNearest(bits=8, group_size=32), model, tmp_path / "first")
    second, _ = apply_stage(
        Gptq(bits=4, group_size=32, ignore=("*.self_attn.*",)), tmp_path / "first", tmp_path / "second", WINDOWS
    )

    assert second.schemes["model.layers.0.self_attn.q_proj"].bits == 8
    assert second.schemes["model.layers.0.mlp.up_proj"].bits == 4
    for module in ("model.layers.0.self_attn.q_proj", "model.layers.2.self_attn.o_proj"):
        assert torch.equal(first.codes(module)[0], second.codes(module)[0])
