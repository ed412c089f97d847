"""`compress eval`: any model judged by a recipe's gates, against the source or against another model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.helpers import Ended, changed, write_recipe

QUALITY = ("perplexity.held-out", "divergence.held-out.mean_kl", "divergence.held-out.top1_agreement")


@pytest.fixture(scope="module")
def module_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("eval")


@pytest.fixture
def published(module_folder: Path, glass_recipe: dict[str, Any], here: Callable[..., Ended]) -> Path:
    """A store with one published version, made once for this file; its recipe lies beside it."""
    store = module_folder / "store"
    if not store.exists():
        gates = [*glass_recipe["gates"], {"kind": "events", "event": "rounding_fallback"}]
        gates.append({"kind": "size", "max_ratio": 0.6, "max_effective_bits": 6})
        path = write_recipe(module_folder / "recipe.yaml", changed(glass_recipe, gates=gates))
        ended = here("run", path, "--store", store)
        assert ended.code == 0, ended.err
    return store


def judged(here: Callable[..., Ended], store: Path, model: object, *more: object, code: int = 0) -> dict[str, Any]:
    recipe = store.parent / "recipe.yaml"
    ended = here("eval", model, "--recipe", recipe, "--store", store, "--json", *more)
    assert ended.code == code, ended.err
    report: dict[str, Any] = json.loads(ended.out)
    return report


def test_a_published_version_is_measured_as_it_was_when_it_was_made(published, here, tmp_path):
    made = json.loads((published / "glass-int4" / "v0001" / "reports" / "report.json").read_text(encoding="utf-8"))
    report = judged(here, published, "glass-int4@v0001", "--out", tmp_path / "out")
    for side in ("source", "compressed"):
        for name in (*QUALITY, "weight_bytes", "effective_bits"):
            assert report["measurements"][side].get(name) == made["measurements"][side].get(name), name
    assert [gate["verdict"] for gate in report["gates"]] == [gate["verdict"] for gate in made["gates"]]
    assert report["artifact"]["digest"] == made["artifact"]["digest"]
    assert report["event_counts"]["baseline_reused"] == 1 and "calibration_unknown" not in report["event_counts"]
    assert report["noise"] == made["noise"] and report["noise"][0]["mean_kl"] < 1e-6
    assert report["judged"]["making_recorded"] and report["stages"] == []
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"report.html", "report.md", "junit.xml"}
    assert "nothing was compressed" in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    kept = [".lock", "history.head", "history.jsonl", "v0001"]
    assert sorted(path.name for path in (published / "glass-int4").iterdir()) == kept


def test_the_recipes_calibration_text_need_not_be_at_hand_to_judge(published, here, glass_recipe, tmp_path):
    calibration = {**glass_recipe["calibration"], "data": {"kind": "files", "paths": [str(tmp_path / "gone.txt")]}}
    path = write_recipe(tmp_path / "r.yaml", changed(glass_recipe, calibration=calibration))
    ended = here("eval", "glass-int4@v0001", "--recipe", path, "--store", published)
    assert ended.code == 0, ended.err
    compressing = here("plan", path, "--store", published)
    assert compressing.code == 2 and "gone.txt" in compressing.err


def test_a_folder_from_elsewhere_is_judged_without_the_gates_on_its_making(published, here, tmp_path):
    elsewhere = tmp_path / "somebodys-model"
    shutil.copytree(published / "glass-int4" / "v0001" / "model", elsewhere)
    report = judged(here, published, elsewhere)
    events = next(gate for gate in report["gates"] if gate["kind"] == "events")
    assert (events["verdict"], events["tier"]) == ("inconclusive", "advisory") and "not recorded" in events["sentence"]
    assert report["event_counts"]["calibration_unknown"] == 1 and report["verdict"] == "passed"


def test_the_source_judged_against_itself_differs_in_nothing(published, here, glass):
    report = judged(here, published, glass, code=3)
    assert report["measurements"]["compressed"]["divergence.held-out.mean_kl"] == 0
    failed = [gate["kind"] for gate in report["gates"] if gate["verdict"] == "failed"]
    assert failed == ["size"]  # it is not smaller than itself, and has no effective bits


def test_against_a_release_compares_with_it_but_sizes_stay_relative_to_the_source(published, here, glass):
    report = judged(here, published, "glass-int4@v0001", "--against", published / "glass-int4" / "v0001")
    assert report["measurements"]["compressed"]["divergence.held-out.mean_kl"] == 0
    assert report["measurements"]["source"]["weight_bytes"] == report["measurements"]["compressed"]["weight_bytes"]
    assert next(gate for gate in report["gates"] if gate["kind"] == "size")["verdict"] == "passed"
    swapped = judged(here, published, glass, "--against", "glass-int4", code=3)
    assert swapped["judged"]["reference"] == "glass-int4"
    assert swapped["measurements"]["compressed"]["divergence.held-out.mean_kl"] > 0


def test_text_the_judged_version_was_calibrated_on_is_refused(published, here, glass_recipe, tmp_path):
    seen = {**glass_recipe["calibration"]["data"]}
    evaluation = [{"kind": "perplexity", "data": seen, "set": "seen", "windows": 4, "window_tokens": 128}]
    gates = [{"kind": "relative", "measure": "perplexity.seen", "max_ratio": 1.5}]
    path = write_recipe(
        tmp_path / "r.yaml",
        changed(
            glass_recipe,
            calibration=None,
            evaluation=evaluation,
            gates=gates,
            stages=[{"kind": "round_to_nearest", "bits": 4, "group_size": "channel"}],
        ),
    )
    ended = here("eval", "glass-int4", "--recipe", path, "--store", published)
    assert ended.code == 2 and "overlaps calibration text" in ended.err


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("glass-int5", "glass-int4"),
        ("./nowhere", "no such file or folder"),
        ("glass-int4@v0009", "v0001"),
    ],
)
def test_a_model_that_is_not_there_ends_with_2(published, here, model, said):
    ended = here("eval", model, "--recipe", published.parent / "recipe.yaml", "--store", published)
    assert ended.code == 2 and said in ended.err


def test_a_report_is_never_written_over_another(published, here, tmp_path):
    (tmp_path / "report.json").write_text("{}", encoding="utf-8")
    arguments = ("eval", "glass-int4", "--recipe", published.parent / "recipe.yaml", "--store", published)
    ended = here(*arguments, "--out", tmp_path)
    assert ended.code == 2 and "empty folder" in ended.err
    assert (tmp_path / "report.json").read_text(encoding="utf-8") == "{}"


def test_an_artifact_whose_weights_were_changed_is_not_judged(published, here, tmp_path):
    artifact = tmp_path / "artifact"
    shutil.copytree(published / "glass-int4" / "v0001", artifact)
    weights = next((artifact / "model").glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    for named in (artifact, artifact / "model"):
        ended = here("eval", named, "--recipe", published.parent / "recipe.yaml", "--store", published)
        assert ended.code == 1 and "not those that were published" in ended.err


def test_another_vocabulary_is_refused(published, here, glass, tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(glass, folder)
    model = AutoModelForCausalLM.from_pretrained(glass)
    model.resize_token_embeddings(model.config.vocab_size + 8, mean_resizing=False)
    model.save_pretrained(folder)
    ended = here("eval", folder, "--recipe", published.parent / "recipe.yaml", "--store", published)
    assert ended.code == 2 and "different vocabularies" in ended.err


def test_a_model_without_a_tokenizer_reads_with_the_sources_and_says_so(published, here, tmp_path):
    folder = tmp_path / "bare"
    shutil.copytree(published / "glass-int4" / "v0001" / "model", folder)
    for path in folder.glob("tokenizer*"):
        path.unlink()
    report = judged(here, published, folder)
    assert report["event_counts"]["tokenizer_borrowed"] == 1
    assert report["measurements"]["compressed"]["divergence.held-out.mean_kl"] > 0


def test_a_tokenizer_that_reads_the_text_differently_is_refused(published, here, tmp_path):
    folder = tmp_path / "lower"
    shutil.copytree(published / "glass-int4" / "v0001" / "model", folder)
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    tokenizer["normalizer"] = {"type": "Replace", "pattern": {"String": "e"}, "content": "a"}
    path.write_text(json.dumps(tokenizer), encoding="utf-8")
    ended = here("eval", folder, "--recipe", published.parent / "recipe.yaml", "--store", published)
    assert ended.code == 2 and "held-out: the tokenizer of" in ended.err


def test_weights_with_nan_fail_the_gates(published, here, tmp_path):
    folder = tmp_path / "nan"
    shutil.copytree(published / "glass-int4" / "v0001" / "model", folder)
    path = next(folder.glob("*.safetensors"))
    tensors = load_file(path)
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    report = judged(here, published, folder, code=3)
    assert {gate["measure"] for gate in report["gates"] if gate["verdict"] == "failed"} >= set(QUALITY[:2])
