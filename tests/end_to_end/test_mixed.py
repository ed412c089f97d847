"""mixed_precision in a recipe: one plan, its bytes, its report, and candidates that another budget finds finished."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import Ended, changed, write_recipe

CANDIDATES = {
    "candidates": [3, 4, {"bits": 4, "group_size": 16}, 6],
    "group_size": 32,
    "overrides": [{"match": "*.down_proj", "group_size": 31}],
    "tuning_windows": 4,
    "probes": 3,
    "proposals": 2,
}


def mixed(glass_recipe: dict[str, Any], budget: dict[str, Any], **changes: Any) -> dict[str, Any]:
    stages = [{"kind": "mixed_precision", "budget": budget, **CANDIDATES}, {"kind": "gptq", "bits": "planned"}]
    gates = [{"kind": "threshold", "measure": "divergence.held-out.mean_kl", "max": 0.5}]
    return changed(glass_recipe, **{"stages": stages, "gates": gates, **changes})


@pytest.fixture(scope="module")
def module_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mixed")


@pytest.fixture
def published(module_folder: Path, glass_recipe: dict[str, Any], here: Callable[..., Ended]) -> Path:
    """A version made once for this file."""
    store = module_folder / "store"
    if not store.exists():
        ended = here(
            "run",
            write_recipe(module_folder / "r.yaml", mixed(glass_recipe, {"effective_bits": 4.4})),
            "--store",
            store,
        )
        assert ended.code == 0, ended.err
    return store / "glass-int4" / "v0001"


def report_of(version: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((version / "reports" / "report.json").read_text(encoding="utf-8"))
    return found


def test_a_mixture_for_transformers_says_that_vllm_does_not_serve_it(glass_recipe, here, tmp_path):
    recipe = mixed(glass_recipe, {"effective_bits": 4.4})
    recipe["stages"][0]["runtime"] = "transformers"

    ended = here("run", write_recipe(tmp_path / "r.yaml", recipe), "--store", tmp_path / "store")

    assert ended.code == 0, ended.err
    report = report_of(tmp_path / "store" / "glass-int4" / "v0001")
    assert report["round_trip"]["passed"]
    (event,) = [each for each in report["events"] if each["kind"] == "fused_apart"]
    assert "transformers loads them, vLLM does not" in event["message"]
    shown = here("report", "glass-int4", "--store", tmp_path / "store", "--format", "md")
    assert "vLLM does not serve these files" in " ".join(shown.out.split())


def test_what_ships_has_the_plans_bits_and_loads_as_it_was_measured(published):
    report = report_of(published)
    plan = next(stage for stage in report["stages"] if stage["kind"] == "mixed_precision")["facts"]
    assert report["measurements"]["compressed"]["effective_bits"] == pytest.approx(plan["effective_bits"])
    assert plan["effective_bits"] <= 4.4 and plan["plan"] == "mixed"
    schemes = {module["name"]: module["scheme"] for stage in report["stages"] for module in stage["modules"]}
    for unit in plan["units"]:
        names = [f"model.layers.{unit['block']}.self_attn.{part}" for part in unit["kind"].split("+")]
        names += [f"model.layers.{unit['block']}.mlp.{part}" for part in unit["kind"].split("+")]
        assert {schemes[name] for name in names if name in schemes} == {unit["scheme"]}
    assert report["round_trip"]["passed"]
    assert plan["fit"]["r2"] > 0.9


def test_both_faces_show_the_plan_and_what_it_was_compared_with(published):
    page = (published / "reports" / "report.html").read_text(encoding="utf-8")
    text = (published / "reports" / "report.md").read_text(encoding="utf-8")
    assert "Bits by linear" in page and 'class="bits' in page and page.count('class="sensitive"') == 16
    assert (
        "## Bits by linear" in text
        and "everywhere" in text
        and "units" not in text.split("## Stages")[1].split("## Events")[0]
    )


def test_the_stored_recipe_runs_again_from_what_was_kept(published, here, tmp_path):
    ended = here("run", published / "recipe.yaml", "--store", tmp_path / "store", "--json")
    assert ended.code == 0, ended.err
    report = json.loads(ended.out)
    assert report["event_counts"]["stage_reused"] == 3
    assert [stage["kind"] for stage in report["stages"]] == ["sensitivity", "mixed_precision", "gptq"]


def test_another_budget_finds_the_candidates_finished(published, glass_recipe, here, tmp_path):
    bytes_ = report_of(published)["measurements"]["compressed"]["weight_bytes"] * 1.05
    path = write_recipe(tmp_path / "r.yaml", mixed(glass_recipe, {"weight_bytes": int(bytes_)}))
    ended = here("run", path, "--store", tmp_path / "store", "--json")
    assert ended.code == 0, ended.err
    report = json.loads(ended.out)
    assert [stage["reused"] for stage in report["stages"]] == [True, False, False]
    assert report["measurements"]["compressed"]["weight_bytes"] <= bytes_
    planned = json.loads(here("plan", path, "--store", tmp_path / "store", "--json").out)
    assert planned["stored_bytes"] <= bytes_
    assert planned["budgets"][0].startswith(f"weight_bytes {int(bytes_):,}, in bytes: tensors that stay as they are")


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ([{"kind": "gptq", "bits": "planned"}], "none comes before it"),
        ([{"kind": "mixed_precision", "budget": {"ratio": 0.5}, **CANDIDATES}], "nothing follows its plan"),
        ([{"kind": "sensitivity"}, {"kind": "gptq"}], "there is none"),
        (
            [
                {"kind": "gptq", "group_size": "channel"},
                {"kind": "mixed_precision", "budget": {"ratio": 0.5}, **CANDIDATES},
                {"kind": "gptq", "bits": "planned"},
            ],
            "choose schemes before quantising",
        ),
        (
            [
                {"kind": "mixed_precision", "budget": {"effective_bits": 2}, **CANDIDATES},
                {"kind": "gptq", "bits": "planned"},
            ],
            "The smallest feasible budget is effective_bits 3.5",
        ),
        (
            [
                {"kind": "mixed_precision", "budget": {"serving_bytes": 10**9}, **CANDIDATES},
                {"kind": "gptq", "bits": "planned"},
            ],
            "runtime 1,073,741,824",
        ),
        (
            [
                {
                    "kind": "mixed_precision",
                    "runtime": "llama.cpp",
                    "budget": {"ratio": 0.5},
                    "ignore": ["*.down_proj"],
                },
                {"kind": "gptq", "bits": "planned"},
            ],
            "its budget counts bytes of gguf, and export.format is compressed-tensors",
        ),
        (
            [
                {"kind": "mixed_precision", "budget": {"ratio": 0.5}, "candidates": [4, 5], "group_size": 32},
                {"kind": "gptq", "bits": "planned"},
            ],
            "341 input columns do not divide",
        ),
        (
            [
                {"kind": "mixed_precision", "budget": {"ratio": 0.5}, **CANDIDATES},
                {"kind": "gptq", "bits": "planned", "group_size": 32},
            ],
            "leaves group_size to the mixed_precision stage",
        ),
        ([{"kind": "mixed_precision", **CANDIDATES}, {"kind": "gptq", "bits": "planned"}], "budget"),
    ],
)
def test_plans_that_cannot_be_are_refused_before_work_starts(stages, said, glass_recipe, here, tmp_path):
    path = write_recipe(tmp_path / "r.yaml", changed(glass_recipe, stages=stages))
    ended = here("plan", path, "--store", tmp_path / "store")
    assert ended.code == 2 and said in ended.err.replace("\n", " "), ended.err


def test_too_few_windows_to_keep_some_apart_are_an_error(glass_recipe, here, tmp_path):
    calibration = {**glass_recipe["calibration"], "windows": 4}
    path = write_recipe(tmp_path / "r.yaml", mixed(glass_recipe, {"ratio": 0.6}, calibration=calibration))
    ended = here("run", path, "--store", tmp_path / "store")
    assert ended.code == 2 and "tuning_windows" in ended.err


GGUF = {"runtime": "llama.cpp", "vocabulary": True, "ignore": ["*.down_proj"], "tuning_windows": 4, "probes": 3}
FOLLOWED = [{"kind": "vocabulary", "bits": "planned"}, {"kind": "gptq", "bits": "planned"}]


def test_embedding_and_linears_share_a_budget_of_the_files_bytes(glass_recipe, here, tmp_path):
    first = {"kind": "mixed_precision", "budget": {"ratio": 0.45}, "proposals": 2, **GGUF}
    gates = [{"kind": "threshold", "measure": "divergence.held-out.mean_kl", "max": 0.5}]
    recipe = changed(glass_recipe, stages=[first, *FOLLOWED], gates=gates, export={"format": "gguf"})
    path = write_recipe(tmp_path / "r.yaml", recipe)
    planned = json.loads(here("plan", path, "--store", tmp_path / "store", "--json").out)
    ended = here("run", path, "--store", tmp_path / "store", "--json")
    assert ended.code == 0, ended.err
    report = json.loads(ended.out)
    facts = next(stage for stage in report["stages"] if stage["kind"] == "mixed_precision")["facts"]
    source, made = (report["measurements"][which]["weight_bytes"] for which in ("source", "compressed"))
    assert made <= 0.45 * source and planned["stored_bytes"] <= 0.45 * source
    assert made == facts["linear_bytes"] + facts["other_bytes"]
    (outside,) = [unit for unit in facts["units"] if unit["block"] is None]
    page = next((tmp_path / "store").rglob("report.html")).read_text(encoding="utf-8")
    assert "linears and vocabulary take" in page and outside["kind"] in page


def test_the_smallest_that_the_gates_would_pass_is_found_without_their_text(glass_recipe, here, tmp_path):
    stages = [{"kind": "mixed_precision", "stop": "first_pass", **CANDIDATES}, {"kind": "gptq", "bits": "planned"}]
    made = {}
    for bound in (0.01, 0.04):
        gates = [{"kind": "threshold", "measure": "divergence.held-out.mean_kl", "max": bound}]
        path = write_recipe(tmp_path / f"{bound}.yaml", changed(glass_recipe, stages=stages, gates=gates))
        ended = here("run", path, "--store", tmp_path / "store", "--json")
        assert ended.code == 0, ended.err
        report = json.loads(ended.out)
        facts = next(stage for stage in report["stages"] if stage["kind"] == "mixed_precision")["facts"]
        assert facts["bounds"] == f"a mean KL of {bound:g}" and facts["kl"] <= 0.8 * bound
        made[bound] = report["measurements"]["compressed"]["weight_bytes"]
    assert made[0.04] < 0.95 * made[0.01]
    stored = sorted((tmp_path / "store").rglob("recipe.yaml"))[-1].read_text(encoding="utf-8")
    assert "max_kl: 0.04" in stored and "share_of_bounds: 0.8" in stored


FIRST = {"kind": "mixed_precision", "stop": "first_pass", **CANDIDATES}
CHOSEN = {"kind": "mixed_precision", "budget": {"ratio": 0.5}, **GGUF}


@pytest.mark.parametrize(
    ("stages", "changes", "said"),
    [
        ([FIRST, FOLLOWED[1]], {"gates": [{"kind": "size", "max_ratio": 0.9}]}, "none bounds a mean KL"),
        (
            [FIRST, FOLLOWED[1]],
            {"gates": [{"kind": "relative", "measure": "weight_bytes", "max_ratio": 1}]},
            "none bounds",
        ),
        ([CHOSEN, FOLLOWED[1]], {"export": {"format": "gguf"}}, "add {kind: vocabulary, bits: planned} right after it"),
        ([CHOSEN, *FOLLOWED[::-1]], {"export": {"format": "gguf"}}, "stages[2]: put it right after mixed_precision"),
        ([FIRST, *FOLLOWED], {}, "chooses for linears; give it vocabulary: true"),
        ([{**FIRST, "vocabulary": True}, *FOLLOWED], {}, "compressed-tensors holds model.embed_tokens in 16 bits only"),
        ([{"kind": "vocabulary", "group_size": 32}, CHOSEN, *FOLLOWED], {"export": {"format": "gguf"}}, "has rounded"),
        ([FOLLOWED[0]], {}, "stages[0]: bits: planned follows a mixed_precision stage, and none comes before it"),
        ([FIRST, FIRST, FOLLOWED[1]], {}, "stages[1]: another mixed_precision stage has chosen already"),
        ([FIRST, FOLLOWED[1], FOLLOWED[1]], {}, "stages[2]: linears were quantised before it"),
        ([{**FOLLOWED[0], "scales": "minmax"}], {}, "leaves scales to the mixed_precision stage"),
        ([{**FOLLOWED[0], "group_size": 32}], {}, "leaves group_size to the mixed_precision stage"),
    ],
)
def test_choices_for_a_vocabulary_and_bounds_are_checked_before_work_starts(
    stages, changes, said, glass_recipe, here, tmp_path
):
    path = write_recipe(tmp_path / "r.yaml", changed(glass_recipe, stages=stages, **changes))
    ended = here("plan", path, "--store", tmp_path / "store")
    assert ended.code == 2 and said in ended.err.replace("\n", " "), ended.err
    assert ended.err.count(said) == 1, "said once, though an implied stage repeats it"
