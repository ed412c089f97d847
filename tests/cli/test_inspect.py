"""`compress list`, `show`, `verify`, `kinds`, `init`, `schema`, `gc` and the help; with --json one document each."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from compress.checkpoints.formats import FORMATS
from compress.cli import init
from compress.steps import costs
from tests.artifacts.conftest import overwrite
from tests.helpers import run_cli
from tests.tiny import random_model


@pytest.fixture
def copy_of_store(published, tmp_path) -> Path:
    return Path(shutil.copytree(published[0], tmp_path / "store"))


def test_list_shows_published_and_rejected_runs(here, published, rejected):
    passed = json.loads(here("list", "--store", published[0], "--json").out)
    failed = json.loads(here("list", "--store", rejected[0], "--json").out)

    assert [(row["name"], row["version"], row["verdict"]) for row in passed] == [("glass-int4", "v0001", "passed")]
    assert [(row["version"], row["verdict"]) for row in failed] == [("r0001", "failed")]


def test_list_prints_a_table_for_people(here, published):
    ended = here("list", "--store", published[0])

    assert ended.code == 0
    assert "glass-int4" in ended.out and "v0001" in ended.out and "passed" in ended.out


def test_list_of_an_empty_store_says_so(here, tmp_path):
    ended = here("list", "--store", tmp_path)

    assert (ended.code, ended.out) == (0, f"{tmp_path} holds no artifacts.\n")


def test_show_prints_the_report(here, published, rejected):
    assert json.loads(here("show", "glass-int4", "--store", published[0], "--json").out)["verdict"] == "passed"
    assert json.loads(here("show", "glass-int4@r0001", "--store", rejected[0], "--json").out)["verdict"] == "failed"
    assert "glass-int4" in here("show", "glass-int4", "--store", published[0]).out


def test_verify_finds_a_fresh_artifact_whole(here, published):
    ended = here("verify", "glass-int4", "--store", published[0], "--json")

    assert ended.code == 0
    assert json.loads(ended.out)["ok"] is True


def test_verify_finds_one_flipped_byte_and_ends_with_1(here, copy_of_store):
    weights = copy_of_store / "glass-int4" / "v0001" / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    overwrite(weights, bytes(content))

    ended = here("verify", "glass-int4", "--store", copy_of_store)

    assert ended.code == 1
    assert ended.err == "error: model/model.safetensors: its bytes have changed since it was published\n"


@pytest.mark.parametrize("name", ["model/config.json", "recipe.yaml", "reports/report.json"])
def test_verify_finds_a_missing_file(here, copy_of_store, name):
    (copy_of_store / "glass-int4" / "v0001" / name).unlink()

    ended = here("verify", "glass-int4", "--store", copy_of_store)

    assert ended.code == 1
    assert name in ended.err


def test_verify_finds_a_file_that_nobody_declared(here, copy_of_store):
    (copy_of_store / "glass-int4" / "v0001" / "model" / "extra.bin").write_bytes(b"x")

    ended = here("verify", "glass-int4", "--store", copy_of_store)

    assert ended.code == 1
    assert "extra.bin" in ended.err


def test_kinds_lists_every_registered_kind_with_its_fields(here):
    catalogue = json.loads(here("kinds", "--json").out)

    quantising = {"gptq", "mixed_precision", "recover", "round_to_nearest", "sensitivity"}
    quantising |= {"bitsandbytes", "smoothquant", "awq", "kv_cache", "vocabulary"}
    assert set(catalogue["stages"]) == quantising | {"structured_prune", "sparsify"}
    assert {"threshold", "relative", "non_inferiority", "size", "memory", "latency", "events"} == set(
        catalogue["gates"]
    )
    assert "group_size" in catalogue["stages"]["gptq"]["fields"]
    assert all(entry["description"] for group in catalogue.values() for entry in group.values())


def test_init_writes_a_recipe_that_validates_and_never_overwrites(here, tmp_path, glass):
    path = tmp_path / "new.yaml"

    assert here("init", path, "--model", glass).code == 0
    assert here("validate", path).code == 0
    assert yaml.safe_load(path.read_text())["model"]["path"] == str(glass)
    assert yaml.safe_load(path.read_text())["stages"][0]["overrides"] == [
        {"match": "*.down_proj", "group_size": "channel"}
    ]
    assert here("plan", path).code == 0, "341 columns do not divide into groups of 64"
    again = here("init", path)
    assert again.code == 2 and "exists already" in again.err


@pytest.mark.parametrize(
    ("format_", "stages"),
    [
        (
            "gptq",
            [{"kind": "gptq", "bits": 4, "group_size": 64, "ignore": [f"*.{x}_proj" for x in ("gate", "up", "down")]}],
        ),
        ("bitsandbytes", [{"kind": "bitsandbytes", "type": "nf4", "ignore": ["*.down_proj"]}]),
        (
            "gguf",
            [
                {"kind": "vocabulary", "bits": 8, "group_size": 32},
                {
                    **{"kind": "gptq", "bits": 4, "group_size": 32, "symmetric": False, "zero_points": "free"},
                    "ignore": ["*.down_proj"],
                },
            ],
        ),
    ],
)
def test_init_writes_stages_that_the_format_holds(here, tmp_path, glass, format_, stages):
    path = tmp_path / "new.yaml"

    assert here("init", path, "--model", glass, "--format", format_).code == 0
    written = yaml.safe_load(path.read_text())["stages"]
    assert {stage["kind"]: stage.pop("products", None) for stage in written}.get("gptq", "auto") == "auto"
    assert written == stages
    planned = here("plan", path)
    assert planned.code == 0, planned.err
    assert ("tokenizer_left_out" in planned.out) == (format_ == "gguf"), "glass splits text its own way"


WIDE = {"hidden_size": 256, "intermediate_size": 512}
NARROW_HEADS = {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 256}
NARROW_HEADS["hidden_size"] = 128
ODD = {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 224}
SMALL = {"hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 16}
A_ROW = [{"match": f"*.{name}", "group_size": "channel"} for name in ("c_attn", "attn.c_proj", "c_fc")]


@pytest.mark.parametrize(
    ("name", "sizes", "options", "stages"),
    [
        ("llama", WIDE, ["gguf"], [{"k_quant": True}, {"k_quant": True}]),
        (
            "llama",
            WIDE,
            ["gguf", "--group-size", "64"],
            [{"group_size": 64}, {"group_size": 64, "zero_points": "free"}],
        ),
        ("llama", NARROW_HEADS, ["gptq"], [{"ignore": ["*.q_proj", "*.k_proj", "*.v_proj"]}]),
        ("llama", ODD, ["gguf", "--group-size", "64"], [{"group_size": 32}, {"group_size": 64}]),
        ("llama", ODD, ["gguf", "--group-size", "channel"], [{"group_size": "channel"}, {"group_size": "channel"}]),
        ("llama", SMALL, ["gguf"], [{"kind": "gptq"}]),
        ("gpt2", {"n_embd": 80, "n_inner": 320, "n_head": 4}, ["plain"], [{"overrides": A_ROW}]),
    ],
)
def test_what_init_writes_for_a_folder_passes_plan(here, tmp_path, name, sizes, options, stages):
    random_model(name, tmp_path / "model", **sizes)
    path = tmp_path / "new.yaml"

    assert here("init", path, "--model", tmp_path / "model", "--format", *options).code == 0
    written = yaml.safe_load(path.read_text())["stages"]
    assert len(written) == len(stages)
    for found, expected in zip(written, stages, strict=True):
        assert {key: found.get(key) for key in expected} == expected
    planned = here("plan", path)
    assert planned.code == 0, planned.err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--format", "ggf"], 'unknown. Did you mean "gguf"?'),
        (["--format", "gguf", "--group-size", "48"], "gguf has blocks of 32 columns"),
        (["--group-size", "²"], "give a number of columns"),
        (["--group-size", "64x"], "give a number of columns"),
        (["--group-size", "1"], "give a number of columns"),
        (["--format", "bitsandbytes", "--group-size", "64"], "leave it out"),
        (["--format", "bitsandbytes", "--calibration", "python-help"], "reads no text"),
        (["--name", "My Model"], "cannot name an artifact"),
        (["--model", "path/to/model"], "no such file or folder"),
        (["--model", "/"], "a folder without a config.json"),
        (["--calibration", "nope"], "--calibration: no text is called 'nope'"),
        (["--evaluation", "python-docstring"], 'Did you mean "python-docstrings"'),
    ],
)
def test_init_refuses_what_no_recipe_could_say(here, tmp_path, options, said):
    ended = here("init", tmp_path / "new.yaml", *options)

    assert ended.code == 2 and said in ended.err and not (tmp_path / "new.yaml").exists()


def test_init_tells_what_it_left_out_and_refuses_where_that_is_all(here, tmp_path, glass):
    ended = here("init", tmp_path / "new.yaml", "--model", glass, "--format", "gguf")
    assert 'left in 16 bits, since gguf cannot hold them: "*.down_proj"' in ended.err

    random_model("llama", tmp_path / "model", **{**SMALL, "intermediate_size": 48})
    ended = here("init", tmp_path / "other.yaml", "--model", tmp_path / "model", "--format", "gptq")
    assert ended.code == 2 and "holds none of this model's linears" in ended.err


@pytest.mark.parametrize(
    ("what", "said"), [("folder", "a folder; name the recipe in it"), ("bytes", "cannot be read as text in UTF-8")]
)
def test_what_is_no_recipe_file_is_told_as_what_it_is(here, tmp_path, what, said):
    path = tmp_path / what
    path.mkdir() if what == "folder" else path.write_bytes(bytes(range(128, 256)))

    ended = here("plan", path)

    assert ended.code == 2 and said in ended.err


@pytest.mark.parametrize("name", ["123", "true", "1e5", "smollm2-int4"])
def test_init_writes_names_that_yaml_reads_back(here, tmp_path, name):
    assert here("init", tmp_path / "new.yaml", "--name", name).code == 0
    assert here("validate", tmp_path / "new.yaml").code == 0
    assert yaml.safe_load((tmp_path / "new.yaml").read_text())["name"] == name


@pytest.mark.parametrize("stem", ["Ünïcode Mödel", "m" * 80, "-._"])
def test_init_names_an_artifact_after_any_folder(here, tmp_path, glass, stem):
    shutil.copytree(glass, tmp_path / stem)

    assert here("init", tmp_path / "new.yaml", "--model", tmp_path / stem).code == 0
    assert here("validate", tmp_path / "new.yaml").code == 0


def test_init_writes_paths_that_yaml_reads_back(here, tmp_path, glass):
    place = tmp_path / "a #b: c"
    shutil.copytree(glass, place)

    assert here("init", tmp_path / "new.yaml", "--model", place).code == 0
    assert yaml.safe_load((tmp_path / "new.yaml").read_text())["model"] == {"path": str(place)}
    missing = here("init", tmp_path / "other.yaml", "--model", "./nowhere")
    assert missing.code == 2 and "no such file or folder" in missing.err


@pytest.mark.parametrize(
    "edit",
    [{"hidden_size": "big"}, {"num_attention_heads": 0}, {"num_hidden_layers": 0}, {"hidden_act": "foo"}],
    ids=lambda edit: next(iter(edit)),
)
def test_a_config_that_no_model_has_is_told_as_one(here, tmp_path, glass, edit):
    copy = Path(shutil.copytree(glass, tmp_path / "model"))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, **edit}))

    assert here("init", tmp_path / "new.yaml", "--model", copy).code == 0
    planned = here("plan", tmp_path / "new.yaml")
    assert planned.code == 5 and "config.json" in planned.err and "internal error" not in planned.err


def test_plan_refuses_gates_that_no_run_could_judge_and_stages_that_leave_everything(here, tmp_path, glass):
    path = tmp_path / "new.yaml"
    assert here("init", path, "--model", glass, "--format", "gguf").code == 0
    for measure in ("resident_bytes", "kv_cache_bytes", "round_trip.mean_kl"):
        gate = f"gates.0={{kind: threshold, measure: {measure}, max: 5}}"
        assert f"there is no round trip, and no {measure}" in here("plan", path, "--set", gate).err
    assert "gguf stores a scale for each 32 columns" not in here("plan", path).out
    wide = here("plan", path, "--set", "stages.1.group_size=64", "--json")
    assert any("group_size 32 is less error" in each for each in json.loads(wide.out)["warnings"])
    nothing = here("plan", path, "--set", "stages.1.ignore=['*']")
    assert nothing.code == 2 and "every linear is ignored, so nothing is quantised" in nothing.err


def test_init_knows_every_format():
    assert {*init.FORMATS} == {*FORMATS}


def test_plan_leaves_a_damaged_tokenizer_to_the_run(here, tmp_path, glass):
    copy = Path(shutil.copytree(glass, tmp_path / "model"))
    (copy / "tokenizer.json").write_text("{")
    assert here("init", tmp_path / "new.yaml", "--model", copy, "--format", "gguf").code == 0

    assert here("plan", tmp_path / "new.yaml").code == 0


def test_plan_json_predicts_bytes_memory_and_time(here, recipe, tmp_path):
    ended = here("plan", recipe(), "--store", tmp_path / "store", "--json")

    planned = json.loads(ended.out)
    assert planned["parameters"] == 852_608
    assert planned["quantised_linears"] == planned["linears"] == 28
    for quantity in ("stored_bytes", "kv_cache_bytes", "peak_host_bytes", "disk_bytes", "seconds"):
        assert planned[quantity] > 0
    assert not (tmp_path / "store").exists()


def test_run_dry_run_is_plan(here, recipe, tmp_path):
    ended = here("run", recipe(), "--store", tmp_path / "store", "--dry-run", "--json")

    assert ended.code == 0 and json.loads(ended.out)["name"] == "glass-int4"
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("verb", [("kinds",), ("schema",), ("validate", "RECIPE"), ("list",), ("gc",)])
def test_json_output_is_one_document_in_a_process_of_its_own(recipe, tmp_path, verb):
    arguments = [str(recipe()) if part == "RECIPE" else part for part in verb]
    flags = [] if verb == ("schema",) else ["--json"]

    ended = run_cli(*arguments, *flags, cwd=tmp_path, env={"COMPRESS_CACHE": str(tmp_path / "cache")})

    assert ended.code == 0, ended.err
    json.loads(ended.out)


def test_help_does_not_import_torch():
    program = (
        "import sys; from compress.cli.app import guarded; code = guarded(['--help']); "
        "heavy = {'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules); "
        "print('HEAVY', sorted(heavy), file=sys.stderr); sys.exit(code)"
    )
    import subprocess

    from tests.helpers import environment

    done = subprocess.run([sys.executable, "-c", program], env=environment(), capture_output=True, text=True)

    assert done.returncode == 0
    assert "HEAVY []" in done.stderr
    for verb in ("run", "plan", "validate", "init", "kinds", "list", "show", "verify"):
        assert verb in done.stdout


def test_version_is_printed(here):
    from compress import __version__

    assert here("--version").out == f"compress {__version__}\n"


def test_gc_removes_cached_stages_and_says_how_much(here, recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))
    assert here("run", recipe(), "--store", tmp_path / "store").code == 0

    would = json.loads(here("gc", "--dry-run", "--json").out)
    assert would["bytes"] > 0 and list((tmp_path / "cache" / "stages").glob("*/stage.json"))
    assert json.loads(here("gc", "--json").out)["bytes"] == would["bytes"]
    assert not list((tmp_path / "cache" / "stages").glob("*/stage.json"))
    assert (tmp_path / "store" / "glass-int4" / "v0001" / "manifest.json").is_file()


def test_low_memory_is_predicted_to_take_less_memory_and_more_time(recipe, here, glass_recipe, tmp_path, monkeypatch):
    """4096 windows of 128 tokens: what is held inside a block is hundreds of MiB. As one machine of constant speed."""
    monkeypatch.setattr(costs, "_multiplication_rate", lambda machine: 1e11)
    found = {}
    for low in (False, True):
        stage = {**glass_recipe["stages"][0], "low_memory": low}
        path = recipe(stages=[stage], calibration={**glass_recipe["calibration"], "windows": 4096})
        ended = here("plan", path, "--store", tmp_path / "store", "--json")
        assert ended.code == 0, ended.err
        found[low] = json.loads(ended.out)

    assert found[True]["peak_host_bytes"] < found[False]["peak_host_bytes"] - 300 * 2**20
    assert found[True]["seconds"] > found[False]["seconds"]
