"""Every door out, by the command: runs that publish in a format, and `compress export` from a version that is there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from compress.checkpoints.reader import Checkpoint
from tests.helpers import changed, write_recipe

KEPT = {"kind": "gptq", "bits": 4, "group_size": 32, "ignore": ["*.down_proj"]}
W8A8 = {"kind": "round_to_nearest", "bits": 8, "group_size": "channel", "inputs": "int8"}


def run(here, recipe, folder: Path, stages, format_: str, code: int = 0, **more):
    folder.mkdir(exist_ok=True)
    path = write_recipe(
        folder / "recipe.yaml", changed(recipe, stages=stages, export={"format": format_, "context": 128}, **more)
    )
    ended = here("run", path, "--store", folder / "store", "--json")
    assert ended.code == code, ended.err
    return json.loads(ended.out)


@pytest.fixture(scope="module")
def module_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("doors")


@pytest.fixture
def published(module_folder, glass_recipe, here):
    """A store with one version in compressed-tensors, whose groups every format could take."""
    if not (module_folder / "store").exists():
        run(here, glass_recipe, module_folder, [KEPT], "compressed-tensors")
    return module_folder / "store"


def newest(store: Path) -> Path:
    return sorted((store / "glass-int4").glob("v*"))[-1]


def test_an_export_is_a_new_version_with_the_same_measurements_that_names_its_parent(published, here):
    parent = json.loads((published / "glass-int4" / "v0001" / "manifest.json").read_text())
    made = json.loads((published / "glass-int4" / "v0001" / "reports" / "report.json").read_text())

    ended = here("export", "glass-int4@v0001", "--format", "gguf", "--store", published, "--json")

    assert ended.code == 0, ended.err
    report = json.loads(ended.out)
    folder = newest(published)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert report["parent"]["version"] == "v0001" and report["artifact"]["version"] == folder.name
    assert manifest["lineage"]["parent"] == parent["digest"]
    kl = "divergence.held-out.mean_kl"
    found, before = report["measurements"]["compressed"], made["measurements"]["compressed"]
    assert found[kl] == pytest.approx(before[kl], rel=0.05)
    assert found["effective_bits"] == 4.5
    assert report["memory"]["stored"]["predicted"] == report["memory"]["stored"]["measured"]
    assert report["stages"] == made["stages"]
    assert report["event_counts"]["module_kept"] == 4 and report["event_counts"]["tokenizer_left_out"] == 1
    assert (folder / "model" / "model.gguf").is_file() and not list((folder / "model").glob("*.safetensors"))
    assert here("verify", f"glass-int4@{folder.name}", "--store", published).code == 0
    judged = here(
        "eval", f"glass-int4@{folder.name}", "--recipe", folder / "recipe.yaml", "--store", published, "--json"
    )
    assert json.loads(judged.out)["measurements"]["compressed"][kl] == found[kl]


@pytest.mark.parametrize("name", ["gemma", "gemma3_text", "smollm3", "phi3"])
def test_a_gguf_of_other_architectures_is_judged_by_what_is_in_it(glass_recipe, glass, here, tmp_path, name):
    import shutil

    from tests.tiny import random_model

    changes = {"smollm3": {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0]}, "phi3": {"sliding_window": None}}
    random_model(name, tmp_path / "model", vocab_size=1024, max_position_embeddings=128, **changes.get(name, {}))
    for path in glass.glob("tokenizer*"):
        shutil.copyfile(path, tmp_path / "model" / path.name)
    model = {"path": str(tmp_path / "model"), "max_perplexity": 1e9}
    fields = {"model": model, "gates": [{"kind": "events", "event": "scales_rounded", "max": 0}]}
    stage = {"kind": "round_to_nearest", "bits": 4, "group_size": 32}

    found = {
        format_: run(here, glass_recipe, tmp_path / format_, [stage], format_, **fields)
        for format_ in ("plain", "gguf")
    }

    stored = found["gguf"]["memory"]["stored"]
    assert stored["predicted"] == stored["measured"]
    kl = [report["measurements"]["compressed"]["divergence.held-out.mean_kl"] for report in found.values()]
    assert kl[0] > 0.001 and kl[1] == pytest.approx(kl[0], rel=0.05)


def test_embedding_and_head_are_quantised_where_the_format_holds_them(glass_recipe, here, tmp_path):
    plain = run(here, glass_recipe, tmp_path / "plain", [KEPT], "gguf")
    report = run(here, glass_recipe, tmp_path / "rounded", [{"kind": "vocabulary", "group_size": 32}, KEPT], "gguf")

    memory, before = report["memory"], plain["memory"]
    assert memory["stored"]["predicted"] == memory["stored"]["measured"]
    weights = 1024 * 128  # of the embedding, which the head is tied to
    assert before["stored"]["measured"] - memory["stored"]["measured"] == 2 * weights - weights * 34 // 32
    (module,) = report["stages"][0]["modules"]
    assert module["name"] == "model.embed_tokens" and module["block"] is None
    assert report["measurements"]["compressed"]["effective_bits"] == 4.5  # of linears
    kl = "divergence.held-out.mean_kl"
    found, other = report["measurements"]["compressed"][kl], plain["measurements"]["compressed"][kl]
    assert found != other and found == pytest.approx(other, rel=0.2)
    page = (Path(report["artifact"]["path"]) / "reports" / "report.html").read_text()
    assert "model.embed_tokens" in page
    card = (Path(report["artifact"]["path"]) / "model" / "README.md").read_text()
    assert report["event_counts"]["tokenizer_left_out"] == 1 and "llama-cli" not in card and "token ids" in card

    path = write_recipe(tmp_path / "refused.yaml", changed(glass_recipe, stages=[{"kind": "vocabulary"}, KEPT]))
    refused = here("plan", path)
    assert refused.code == 2 and "the head is tied to it" in refused.err and "gguf, plain" in refused.err


def test_a_flipped_bit_in_a_gguf_is_named(published, here, tmp_path):
    import shutil

    here("export", "glass-int4@v0001", "--format", "gguf", "--store", published)
    copy = shutil.copytree(newest(published), tmp_path / "copy")
    path = copy / "model" / "model.gguf"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.chmod(0o644)
    path.write_bytes(bytes(content))

    ended = here("verify", copy)

    assert ended.code == 1 and "model/model.gguf" in ended.err


def test_a_version_without_integers_is_no_parent(published, here):
    assert here("export", "glass-int4@v0001", "--format", "plain", "--store", published).code == 0
    version = newest(published).name

    ended = here("export", f"glass-int4@{version}", "--format", "gguf", "--store", published)

    assert ended.code == 2
    assert "is in the format plain, from which integers are not read back" in ended.err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--format", "ggfu"), 'Did you mean "gguf"?'),
        (("--format", "compressed-tensors"), "is in the format compressed-tensors already"),
        (("--format", "gptq"), "341 rows and 128 columns must both divide by 32"),
        (("--format", "bitsandbytes"), "it holds what a bitsandbytes stage makes"),
        (("--format", "gguf", "--set", "seed=3"), "only values under export can change"),
    ],
)
def test_exports_that_cannot_be_say_why(published, here, arguments, sentence):
    ended = here("export", "glass-int4@v0001", "--store", published, *arguments)

    assert ended.code == 2 and sentence in ended.err


def test_w8a8_is_published_with_a_round_trip_and_read_back(glass_recipe, here, tmp_path):
    report = run(here, glass_recipe, tmp_path, [{"kind": "smoothquant"}, W8A8], "compressed-tensors")
    folder = newest(tmp_path / "store")

    assert report["round_trip"]["passed"]
    assert report["memory"]["stored"]["predicted"] == report["memory"]["stored"]["measured"]
    assert {scheme.inputs for scheme in Checkpoint(folder / "model").schemes.values()} == {8}
    judged = here("eval", "glass-int4", "--recipe", folder / "recipe.yaml", "--store", tmp_path / "store", "--json")
    kl = "divergence.held-out.mean_kl"
    assert json.loads(judged.out)["measurements"]["compressed"][kl] == report["measurements"]["compressed"][kl]
    planned = here("plan", tmp_path / "recipe.yaml")
    assert "not on Blackwell" in planned.out


@pytest.mark.parametrize("type_", ["nf4", "int8"])
def test_bitsandbytes_is_published_and_comes_back_equal(glass_recipe, here, tmp_path, type_):
    pytest.importorskip("bitsandbytes")
    stages = [{"kind": "bitsandbytes", "type": type_, "ignore": ["*.down_proj"]}]
    evaluation = [*glass_recipe["evaluation"], {"kind": "prompts", "max_new_tokens": 4}]
    report = run(here, glass_recipe, tmp_path, stages, "bitsandbytes", evaluation=evaluation)

    assert report["round_trip"]["passed"] and report["round_trip"]["mean_kl"] < 1e-4
    predicted, measured = (report["memory"]["stored"][side] for side in ("predicted", "measured"))
    assert predicted == pytest.approx(measured, rel=1e-3)
    assert report["round_trip"]["passed"]
    warned = here("plan", tmp_path / "recipe.yaml", "--json")
    of_rows = [each for each in json.loads(warned.out)["warnings"] if "rows divide by 32" in each]
    assert len(of_rows) == (type_ == "nf4"), "glass has linears of 341 rows"


def test_an_fp8_cache_is_judged_and_halves_what_the_report_says_of_it(glass_recipe, here, tmp_path):
    plain = run(here, glass_recipe, tmp_path / "a", [KEPT], "compressed-tensors")
    cached = run(here, glass_recipe, tmp_path / "b", [KEPT, {"kind": "kv_cache"}], "compressed-tensors")
    kl = "divergence.held-out.mean_kl"

    assert cached["round_trip"]["passed"]
    assert cached["memory"]["kv_cache"]["predicted"] == plain["memory"]["kv_cache"]["predicted"] / 2
    assert cached["measurements"]["compressed"][kl] != plain["measurements"]["compressed"][kl]
    assert cached["memory"]["stored"]["predicted"] == cached["memory"]["stored"]["measured"]


@pytest.mark.parametrize(
    ("stages", "format_", "sentence"),
    [
        ([{"kind": "vocabulary", "group_size": 32}] * 2 + [KEPT], "gguf", "was rounded by stages[0] already"),
        ([{"kind": "vocabulary", "parts": "head"}, KEPT], "gguf", "is tied to its embedding"),
        ([{"kind": "kv_cache"}, KEPT], "compressed-tensors", "calibrates the cache of the finished model; put it last"),
        ([KEPT, {"kind": "kv_cache"}], "gguf", "gguf has no place for scales of a KV cache; compressed-tensors has"),
        ([{"kind": "bitsandbytes", "type": "int8"}, {"kind": "awq"}], "plain", "works on plain weights"),
        ([{**KEPT, "inputs": "int8"}], "compressed-tensors", "int8 inputs go with bits: 8"),
        ([W8A8], "gptq", "its inputs are not. Formats that can: compressed-tensors"),
        ([KEPT, {"kind": "smoothquant"}], "compressed-tensors", "works on plain weights"),
    ],
)
def test_stages_and_formats_that_do_not_go_together_are_refused(
    glass_recipe, here, tmp_path, stages, format_, sentence
):
    export = {"format": format_, "context": 128}
    path = write_recipe(tmp_path / "recipe.yaml", changed(glass_recipe, stages=stages, export=export))

    ended = here("plan", path, "--store", tmp_path / "store")

    assert ended.code == 2 and sentence in ended.err


def test_a_format_whose_loader_is_not_here_is_judged_and_that_is_said(glass_recipe, here, tmp_path, monkeypatch):
    from compress.checkpoints.formats import FORMATS
    from tests.tiny import random_model

    monkeypatch.setattr(type(FORMATS["gptq"]), "loader_needs", ("no_such_module",))
    model = tmp_path / "model"
    random_model("llama", model, attention_bias=False, mlp_bias=False, vocab_size=1024)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).write_bytes((Path(glass_recipe["model"]["path"]) / name).read_bytes())
    recipe = changed(glass_recipe, model={"path": str(model), "max_perplexity": 1e9}, calibration=None)
    stages = [{"kind": "round_to_nearest", "bits": 8, "group_size": 32}]
    for evaluation in recipe["evaluation"]:
        evaluation["window_tokens"] = 64
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"id": "a", "prompt": "Alice was"}\n')
    evaluation = [*recipe["evaluation"], {"kind": "prompts", "file": str(prompts), "max_new_tokens": 4}]

    report = run(here, recipe, tmp_path, stages, "gptq", evaluation=evaluation)

    assert report["event_counts"]["round_trip_skipped"] == 1 and report["round_trip"] is None
    assert len(report["answers"]["pairs"]) == 1
    assert report["measurements"]["compressed"]["divergence.held-out.mean_kl"] < 0.1
    planned = here("plan", tmp_path / "recipe.yaml")
    assert "its public loader needs no_such_module, not installed here" in planned.out


def test_the_dtype_of_an_export_can_be_another(published, here):
    asked = ("export", "glass-int4@v0001", "--format", "plain", "--set", "export.dtype=bfloat16", "--store", published)

    ended = here(*asked, "--json")

    assert ended.code == 0, ended.err
    model = newest(published) / "model"
    assert json.loads((model / "config.json").read_text())["dtype"] == "bfloat16"
    assert {Checkpoint(model).header(name)[0] for name in Checkpoint(model).names} == {"BF16"}


def test_a_child_without_integers_names_its_parent(published, here):
    here("export", "glass-int4@v0001", "--format", "gguf", "--store", published)
    version = newest(published).name

    ended = here("export", f"glass-int4@{version}", "--format", "plain", "--store", published)

    assert ended.code == 2 and "Export from glass-int4@v0001 (compressed-tensors, gptq, bitsandbytes)" in ended.err


def test_an_export_whose_source_is_gone_says_what_it_is_needed_for(glass_recipe, here, tmp_path):
    import shutil

    model = shutil.copytree(glass_recipe["model"]["path"], tmp_path / "model")
    run(here, changed(glass_recipe, model={"path": str(model)}), tmp_path, [KEPT], "compressed-tensors")
    shutil.rmtree(model)

    ended = here("export", "glass-int4", "--format", "gguf", "--store", tmp_path / "store")

    assert ended.code == 2 and "is judged again, for which its source is needed: model.path" in ended.err


def test_an_export_of_a_rejected_run_says_so(glass_recipe, here, tmp_path):
    gates = [{"kind": "threshold", "measure": "weight_bytes", "max": 780_000}]
    run(here, glass_recipe, tmp_path, [KEPT], "compressed-tensors", code=3, gates=gates)

    ended = here("export", "glass-int4@r0001", "--format", "gguf", "--store", tmp_path / "store", "--json")

    assert "glass-int4@r0001, whose own verdict was failed" in json.loads(ended.out)["provenance"]["made_from"]


def test_scales_of_a_sources_cache_stay_with_the_source(glass_recipe, here, tmp_path):
    run(here, glass_recipe, tmp_path / "a", [{"kind": "kv_cache", "per": "head"}], "compressed-tensors")
    source = {"path": str(newest(tmp_path / "a" / "store") / "model")}
    judged = here("eval", "glass-int4", "--recipe", tmp_path / "a" / "recipe.yaml", "--store", tmp_path / "a" / "store")
    assert judged.code == 0, judged.err

    report = run(here, changed(glass_recipe, model=source), tmp_path / "b", [KEPT], "gguf")

    assert report["memory"]["kv_cache"]["predicted"] == 2 * kv_bytes_of(tmp_path / "a")
    planned = here("plan", tmp_path / "b" / "recipe.yaml")
    assert "scales of an fp8 KV cache are left behind" in planned.out
    again = run(here, changed(glass_recipe, model=source), tmp_path / "c", [KEPT], "compressed-tensors")
    assert again["round_trip"]["passed"]
    model = Checkpoint(newest(tmp_path / "c" / "store") / "model")
    assert not model.kv_scales and model.config["quantization_config"]["kv_cache_scheme"] is None


def kv_bytes_of(folder: Path) -> float:
    report = json.loads((newest(folder / "store") / "reports" / "report.json").read_text())
    return report["memory"]["kv_cache"]["predicted"]


def test_eval_knows_a_cache_in_fp8(glass_recipe, here, tmp_path):
    made = run(here, glass_recipe, tmp_path, [KEPT, {"kind": "kv_cache"}], "compressed-tensors")

    judged = here("eval", "glass-int4", "--recipe", tmp_path / "recipe.yaml", "--store", tmp_path / "store", "--json")

    name = "kv_cache_bytes"
    assert json.loads(judged.out)["measurements"]["compressed"][name] == made["measurements"]["compressed"][name]


@pytest.mark.parametrize(
    "stage", [{"kind": "awq", "group_size": 32}, {"kind": "structured_prune", "mlp_channels": 320}]
)
def test_quantised_sources_are_scaled_and_pruned_as_what_they_are_worth(glass_recipe, here, tmp_path, stage):
    run(here, glass_recipe, tmp_path / "a", [W8A8], "compressed-tensors")
    source = {"path": str(newest(tmp_path / "a" / "store") / "model")}
    if stage["kind"] == "structured_prune":
        stage = {**stage, "compare": False}

    report = run(
        here, changed(glass_recipe, model=source), tmp_path / "b", [stage, KEPT], "compressed-tensors", gates=LOOSE
    )

    assert report["round_trip"]["passed"]


LOOSE = [{"kind": "threshold", "measure": "divergence.held-out.mean_kl", "max": 9.0}]


def test_pruning_and_w8a8_are_compared_with_quantising_alone(glass_recipe, here, tmp_path):
    stages = [{"kind": "structured_prune", "mlp_channels": 320}, {**W8A8, "kind": "gptq"}]

    report = run(here, glass_recipe, tmp_path, stages, "compressed-tensors", gates=LOOSE)

    assert any("rounds inputs too" in caveat for caveat in report["quantised_alone"]["caveats"])


@pytest.mark.parametrize(
    ("stages", "sentence"),
    [
        ([{"kind": "smoothquant"}], "nothing quantises after it"),
        ([{"kind": "smoothquant"}, KEPT], "smoothquant is for inputs: int8"),
        ([{"kind": "awq", "bits": 3, "group_size": 32}, KEPT], "awq scales for bits 3, group_size 32"),
    ],
)
def test_channels_scaled_for_nobody_are_a_warning(glass_recipe, here, tmp_path, stages, sentence):
    format_ = "plain" if len(stages) == 1 else "compressed-tensors"
    export = {"format": format_, "context": 128}
    path = write_recipe(tmp_path / "recipe.yaml", changed(glass_recipe, stages=stages, export=export))

    ended = here("plan", path, "--store", tmp_path / "store")

    assert ended.code == 0 and sentence in ended.out


def test_an_awq_group_that_is_no_number_of_columns_is_refused(glass_recipe, here, tmp_path):
    stages = [{"kind": "awq", "group_size": 0}, KEPT]
    ended = here("validate", write_recipe(tmp_path / "recipe.yaml", changed(glass_recipe, stages=stages)))
    assert ended.code == 2 and "group_size is a number of columns" in ended.err
