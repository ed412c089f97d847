"""K-quants through the stages: solved, trained, chosen among, written as they were judged; and what is refused."""

from __future__ import annotations

import gguf
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from compress.architecture import architecture_of
from compress.checkpoints.export import export
from compress.checkpoints.formats import FORMATS
from compress.checkpoints.reader import Checkpoint
from compress.checkpoints.skeleton import Skeleton
from compress.errors import RecipeError
from compress.quantization.grid import dequantize
from compress.quantization.scheme import Scheme
from compress.quantization.super_blocks import K_QUANTS, SuperBlocks
from compress.stages import Gptq, MixedPrecision, Recover, RoundToNearest, Sensitivity, Vocabulary
from compress.stages.quantize import no_k_quant
from compress.training.student import AsExported
from tests.tiny import CPU, apply_stage, our_logits, random_model, random_windows

WIDE = {"hidden_size": 256, "intermediate_size": 512, "attention_bias": False, "mlp_bias": False}
WINDOWS = random_windows(count=48)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wide")
    random_model("llama", folder, torch.float16, **WIDE)
    return folder


def shapes_of(folder):
    return Skeleton(Checkpoint(folder).config, CPU, torch.float32).linear_shapes()


def tensors_of_file(checkpoint, folder):
    export(checkpoint, folder, "gguf", torch.float16, 10**9)
    found = gguf.GGUFReader(str(folder / "model.gguf")).tensors
    return {tensor.name: torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type)) for tensor in found}


@pytest.mark.parametrize("bits", sorted(K_QUANTS))
def test_solving_is_closer_than_rounding_and_ships_what_it_judged(model, tmp_path, bits):
    done, outcome = apply_stage(Gptq(bits=bits, k_quant=True), model, tmp_path / "out", WINDOWS)
    rounded, _ = apply_stage(RoundToNearest(bits=bits, k_quant=True), model, tmp_path / "rounded")

    assert len(outcome.modules) == 14
    assert all(row["error"] < row["rounding_error"] for row in outcome.modules)
    wanted = our_logits(model, WINDOWS)
    ours, plain = ((our_logits(each.folder, WINDOWS) - wanted).square().mean() for each in (done, rounded))
    assert ours < plain
    module = "model.layers.1.mlp.down_proj"
    read = tensors_of_file(done, tmp_path / "export")["blk.1.ffn_down.weight"]
    torch.testing.assert_close(read, done.dense(module), rtol=1e-5, atol=1e-6)
    assert done.schemes[module] == Scheme.of_k_quant(bits)


@pytest.mark.parametrize(("bits", "train"), [(3, "scales+norms"), (4, "scales"), (2, "codes")])
def test_training_moves_super_blocks_and_leaves_their_integers(model, tmp_path, bits, train):
    solved, _ = apply_stage(Gptq(bits=bits, k_quant=True, output_tokens=0), model, tmp_path / "solved", WINDOWS)
    stage = Recover(train=train, epochs=20, batch_tokens=96, learning_rate=1e-3, patience=100)

    done, outcome = apply_stage(stage, tmp_path / "solved", tmp_path / "out", WINDOWS, origin=model)

    assert outcome.facts["held_out_kl_after"] < outcome.facts["held_out_kl_before"]
    module = "model.layers.0.mlp.up_proj"
    (before, old), (after, new) = solved.codes(module), done.codes(module)
    assert isinstance(old.nested, SuperBlocks) and isinstance(new.nested, SuperBlocks)
    assert torch.equal(old.nested.scales, new.nested.scales)
    assert not torch.equal(old.nested.scale, new.nested.scale)
    assert new.nested.scale.dtype == torch.float16
    if new.nested.minima is not None:
        assert torch.equal(old.nested.minima, new.nested.minima)
        assert torch.equal(old.nested.minimum, new.nested.minimum)
    assert torch.equal(before, after) == (train != "codes")
    read = tensors_of_file(done, tmp_path / "export")["blk.0.ffn_up.weight"]
    torch.testing.assert_close(read, done.dense(module), rtol=1e-5, atol=1e-6)


CHOICE = {
    "runtime": "llama.cpp",
    "tuning_windows": 4,
    "candidates": ({"bits": 3, "k_quant": True}, {"bits": 4, "k_quant": True}, {"bits": 6, "k_quant": True}, 8),
}


def test_a_mixture_of_k_quants_keeps_its_budget_and_is_followed(model, tmp_path):
    apply_stage(Sensitivity(**CHOICE), model, tmp_path / "sensitivity", WINDOWS)
    stage = MixedPrecision(**CHOICE, budget={"effective_bits": 4.6}, probes=2, proposals=2)

    chosen, outcome = apply_stage(stage, tmp_path / "sensitivity", tmp_path / "plan", WINDOWS, origin=model)
    done, _ = apply_stage(Gptq(bits="planned"), tmp_path / "plan", tmp_path / "out", WINDOWS, origin=model)

    plan = chosen.precision_plan
    assert plan and done.schemes == plan
    shapes = shapes_of(model)
    size = sum(FORMATS["gguf"].stored_bytes(plan[name], *shape, 2) for name, shape in shapes.items())
    assert outcome.facts["linear_bytes"] == size
    assert 8 * size / sum(rows * columns for rows, columns in shapes.values()) <= 4.6
    assert any(scheme.k_quant for scheme in plan.values())


def test_an_override_takes_linears_out_of_k_quants(model, tmp_path):
    stage = Sensitivity(**CHOICE, overrides=({"match": "*.down_proj", "group_size": 32},))
    names = {name: stage.options(name) for name in shapes_of(model)}

    labels = [option.label for option in names["model.layers.0.mlp.down_proj"]]
    assert labels == [f"int{bits} symmetric group 32" for bits in (3, 4, 6, 8)]
    assert [option.label for option in names["model.layers.0.mlp.up_proj"]][1] == "Q4_K (asymmetric group 32)"
    assert stage.check(shapes_of(model), Checkpoint(model).architecture) == []


def test_an_embedding_may_be_a_k_quant(tmp_path):
    random_model("llama", tmp_path / "model", torch.float16, **WIDE, tie_word_embeddings=True)
    done, _ = apply_stage(Vocabulary(bits=6, k_quant=True), tmp_path / "model", tmp_path / "out")

    read = tensors_of_file(done, tmp_path / "export")["token_embd.weight"]
    embedding = done.architecture.embedding
    torch.testing.assert_close(read, done.dense(embedding), rtol=1e-5, atol=1e-6)
    assert done.schemes[embedding].label == "Q6_K (symmetric group 16)"


def test_columns_that_do_not_divide_are_one_sentence_with_an_override_that_settles_it(tmp_path):
    random_model("llama", tmp_path / "model", torch.float16, hidden_size=64, intermediate_size=256)
    shapes, architecture = shapes_of(tmp_path / "model"), Checkpoint(tmp_path / "model").architecture
    leaves = sorted({name.rsplit(".", 1)[-1] for name in shapes} - {"down_proj"})

    said = Gptq(bits=4, k_quant=True).check(shapes, architecture)
    settled = [{"match": f"*.{leaf}", "group_size": 32} for leaf in leaves]

    assert len(said) == 6 and "64 input columns do not divide by the 256 of a K-quant" in said[0]
    assert "overrides: [{match: '*.q_proj', group_size: 32}]" in said[0]
    assert Gptq(bits=4, k_quant=True, overrides=settled).check(shapes, architecture) == []
    said = Sensitivity(**CHOICE).check(shapes, architecture)
    assert any("overrides: [{match: '*.q_proj', group_size: 32}]" in each for each in said)


@pytest.mark.parametrize(
    ("stage", "fields", "said"),
    [
        (Gptq, {"bits": 8}, "no K-quant has 8 bits; they have 2, 3, 4, 5, 6"),
        (Gptq, {"bits": 4, "group_size": 32}, "says symmetric, group_size, inputs and zero_points by its bits"),
        (Gptq, {"bits": 4, "symmetric": False}, "says symmetric, group_size, inputs and zero_points by its bits"),
        (Gptq, {"bits": 4, "overrides": [{"match": "*.q_proj", "bits": 8, "k_quant": True}]}, "no K-quant has 8 bits"),
        (Gptq, {"overrides": [{"match": "*.q_proj", "group_size": 64, "k_quant": True}]}, "by its bits"),
        (Gptq, {"bits": "planned"}, "leaves k_quant to the mixed_precision stage"),
        (Gptq, {"bits": 4, "zero_points": "free"}, "by its bits"),
        (Gptq, {"bits": 4, "group_size": 64}, "by its bits"),
        (Gptq, {"bits": 4, "symmetric": True}, "by its bits"),
        (Gptq, {"bits": 3, "inputs": "none"}, "by its bits"),
        (Vocabulary, {"bits": 6, "group_size": 64}, "by its bits"),
        (
            Gptq,
            {"overrides": [{"match": "*_proj", "zero_points": "free", "symmetric": True}]},
            "say nothing of symmetric",
        ),
        (Vocabulary, {"bits": 8}, "no K-quant has 8 bits"),
        (Vocabulary, {"bits": 6, "group_size": 32}, "says symmetric, group_size and zero_points by its bits"),
    ],
)
def test_what_a_k_quant_leaves_no_choice_of_is_refused(stage, fields, said):
    with pytest.raises(ValidationError, match=said.replace("(", r"\(")):
        stage(k_quant=True, **fields)


@pytest.mark.parametrize(
    "stage",
    [
        Gptq(bits=3, k_quant=True, overrides=[{"match": "*.mlp.*", "bits": 5}]),
        Vocabulary(bits=6, k_quant=True),
        Sensitivity(runtime="llama.cpp", candidates=[{"bits": 3, "k_quant": True}, {"bits": 5, "symmetric": False}]),
    ],
)
def test_a_resolved_recipe_says_nothing_of_what_the_type_says_and_reads_back(stage):
    written = stage.model_dump(mode="json")
    first = written["candidates"][0] if "candidates" in written else written
    assert first["k_quant"] and not {"symmetric", "group_size", "inputs", "zero_points"} & {*first}
    assert type(stage)(**written) == stage


def test_what_a_stage_says_of_grids_beside_k_quants_is_of_linears_that_leave_them(model):
    overrides = [{"match": "*.down_proj", "bits": 8}]
    stage = Gptq(bits=4, k_quant=True, group_size=32, overrides=overrides)
    written = stage.model_dump(mode="json")

    assert stage.scheme_of("model.layers.0.mlp.down_proj").label == "int8 symmetric group 32"
    assert stage.scheme_of("model.layers.0.mlp.up_proj").label.startswith("Q4_K")
    assert written["group_size"] == 32 and Gptq(**written) == stage
    assert Gptq(bits=4, k_quant=True, overrides=overrides).model_dump()["group_size"] == 64, "what did run is told"
    with pytest.raises(ValidationError, match="by its bits"):
        Gptq(bits=4, k_quant=True, group_size=32, overrides=[{"match": "*.down_proj", "bits": 6}])


@pytest.mark.parametrize(
    ("overrides", "label"),
    [
        ([{"match": "*.mlp.*", "bits": 6}], "Q6_K (symmetric group 16)"),
        ([{"match": "*.mlp.*", "bits": 8}], "int8 symmetric group 64"),
        ([{"match": "*.mlp.*", "group_size": 32}], "int4 symmetric group 32"),
        ([{"match": "*.mlp.*", "symmetric": False, "zero_points": "free"}], "int4 asymmetric group 64, free minima"),
        (
            [{"match": "*_proj", "bits": 8}, {"match": "*.mlp.*", "bits": 5, "k_quant": True}],
            "Q5_K (asymmetric group 32)",
        ),
        ([{"match": "*_proj", "bits": 8}, {"match": "*.mlp.*", "bits": 5}], "int5 symmetric group 64"),
        ([{"match": "*.mlp.*", "zero_points": "free"}], "int4 asymmetric group 64, free minima"),
    ],
)
def test_overrides_leave_k_quants_and_come_back(model, overrides, label):
    stage = Gptq(bits=4, k_quant=True, overrides=overrides)

    assert stage.check(shapes_of(model), Checkpoint(model).architecture) == []
    assert stage.scheme_of("model.layers.0.mlp.up_proj").label == label


def test_where_no_columns_divide_that_is_one_sentence(tmp_path):
    random_model("llama", tmp_path / "model", torch.float16)

    said = Gptq(bits=4, k_quant=True).check(shapes_of(tmp_path / "model"), Checkpoint(tmp_path / "model").architecture)

    assert said == ["no input columns here (64, 96) divide by the 256 of a K-quant; leave k_quant out"]


def test_scales_of_few_of_float16s_smallest_steps_are_an_event(tmp_path):
    """Where even the integers of groups cannot make up for it: the linear is as good as gone."""
    random_model("llama", tmp_path / "model", torch.bfloat16, **WIDE)
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"] *= 1e-6
    save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    for fields in ({"bits": 4, "k_quant": True}, {"bits": 4, "symmetric": False, "zero_points": "free"}):
        name = str(len(fields))
        stage = RoundToNearest(**fields)
        done, _ = apply_stage(stage, tmp_path / "model", tmp_path / name, stored=torch.bfloat16)
        written = export(done, tmp_path / f"{name}-export", "gguf", torch.bfloat16, 10**9)

        rounded = [event.where for event in written.events if event.kind == "scales_rounded"]
        assert rounded == ["model.layers.1.mlp.down_proj"]


def test_a_k_quant_of_bits_that_another_override_gave_is_refused(model):
    overrides = [{"match": "*.mlp.*", "bits": 8}, {"match": "*.up_proj", "k_quant": True}]
    overrides.append({"match": "*.gate_proj", "k_quant": True})

    said = Gptq(bits=4, overrides=overrides).check(shapes_of(model), Checkpoint(model).architecture)

    assert said == [f"overrides, '*.{leaf}_proj': {no_k_quant(8)}" for leaf in ("up", "gate")]


def test_for_other_runtimes_k_quants_are_refused_as_what_they_are(model):
    stage = Sensitivity(runtime="vllm", candidates=[{"bits": 4, "k_quant": True}, 8])

    said = " ".join(stage.check(shapes_of(model), Checkpoint(model).architecture))

    assert "K-quants are llama.cpp's" in said and "zero points" not in said


@pytest.mark.parametrize("fields", [{"k_quant": True}, {"symmetric": False, "zero_points": "free", "group_size": 32}])
def test_bfloat16_models_train_what_they_ship(tmp_path, fields):
    """Scales of super-blocks are float16 whatever the model is in: what training sees is what is written."""
    random_model("llama", tmp_path / "model", torch.bfloat16, **WIDE)
    kept = {"stored": torch.bfloat16}
    solved, _ = apply_stage(Gptq(bits=4, **fields), tmp_path / "model", tmp_path / "solved", WINDOWS, **kept)
    module = "model.layers.1.mlp.up_proj"

    assert torch.equal(AsExported(solved.folder, torch.bfloat16).dense(module), solved.dense(module))
    stage = Recover(train="scales", epochs=20, batch_tokens=96, patience=100)
    done, _ = apply_stage(stage, solved.folder, tmp_path / "out", WINDOWS, origin=tmp_path / "model", **kept)
    scale = done.codes(module)[1].nested.scale
    assert scale.dtype == torch.float16 and not torch.equal(scale, scale.bfloat16().half())


def test_values_outside_the_range_of_what_they_are_written_in_are_refused(tmp_path):
    random_model("llama", tmp_path / "model", torch.bfloat16, **WIDE)
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = 2e5
    save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    stage = RoundToNearest(bits=4, k_quant=True)
    done, _ = apply_stage(stage, tmp_path / "model", tmp_path / "out", stored=torch.float16)

    with pytest.raises(RecipeError, match=r"up_proj\.weight holds values up to 2e"):
        export(done, tmp_path / "plain", "plain", torch.float16, 10**9)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])
def test_weights_outside_what_a_super_block_holds_are_refused_as_other_types_refuse_them(tmp_path, bits):
    random_model("llama", tmp_path / "model", torch.bfloat16, **WIDE)
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3, 5] = 1e30
    save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    done, _ = apply_stage(RoundToNearest(bits=bits, k_quant=True), tmp_path / "model", tmp_path / "stage")

    with pytest.raises(RecipeError, match="outside the float16 that gguf keeps them in"):
        export(done, tmp_path / "export", "gguf", torch.float16, 10**9)


@pytest.mark.parametrize("stage", [Gptq, RoundToNearest, Vocabulary])
def test_symmetric_codes_have_no_zero_points_to_free(stage):
    with pytest.raises(ValidationError, match="zero_points say nothing of symmetric codes"):
        stage(zero_points="free")


def test_free_minima_are_solved_trained_and_kept(model, tmp_path):
    fields = {"bits": 3, "symmetric": False, "group_size": 32}
    free, outcome = apply_stage(Gptq(**fields, zero_points="free"), model, tmp_path / "free", WINDOWS)
    _, integer = apply_stage(Gptq(**fields), model, tmp_path / "integer", WINDOWS)

    assert sum(row["error"] for row in outcome.modules) < 0.9 * sum(row["error"] for row in integer.modules)
    stage = Recover(train="scales", epochs=20, batch_tokens=96, patience=100)
    done, _ = apply_stage(stage, free.folder, tmp_path / "out", WINDOWS, origin=model)
    module = "model.layers.0.mlp.up_proj"
    (_, old), (_, new) = free.codes(module), done.codes(module)
    assert torch.equal(old.nested.minimum, new.nested.minimum) and not torch.equal(old.nested.scale, new.nested.scale)
    read = tensors_of_file(done, tmp_path / "export")["blk.0.ffn_up.weight"]
    torch.testing.assert_close(read, done.dense(module), rtol=1e-5, atol=1e-6)
    for name in ("compressed-tensors", "gptq", "bitsandbytes"):
        assert FORMATS[name].refusal(done.schemes[module], 256, 256)


@pytest.mark.parametrize(
    "candidate", [{"bits": 8}, {"bits": 4, "group_size": 32}, {"bits": 4, "symmetric": True}, {"bits": 16}]
)
def test_candidates_that_mean_nothing_are_refused(candidate):
    with pytest.raises(ValidationError, match=r"no K-quant has 8|by its bits|leaves a linear as it is"):
        Sensitivity(runtime="llama.cpp", candidates=[{**candidate, "k_quant": True}, 4])


def test_formats_with_floating_scales_refuse_them():
    scheme = Scheme.of_k_quant(4)
    for name in ("compressed-tensors", "gptq", "bitsandbytes"):
        assert FORMATS[name].refusal(scheme, 256, 256)
    assert FORMATS["plain"].refusal(scheme, 256, 256) is None
    assert FORMATS["gguf"].refusal(scheme, 256, 256) is None


def test_values_written_out_are_those_of_the_codes(model, tmp_path):
    done, _ = apply_stage(RoundToNearest(bits=3, k_quant=True), model, tmp_path / "out")
    export(done, tmp_path / "plain", "plain", torch.float16, 10**9)

    module = "model.layers.0.mlp.gate_proj"
    assert torch.equal(Checkpoint(tmp_path / "plain").read(f"{module}.weight"), dequantize(*done.codes(module)).half())
    assert architecture_of(done.config).model_type == "llama"
