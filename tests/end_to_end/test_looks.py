"""A gate that cannot decide asks for more windows or items, up to what the recipe allows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.evaluation.tasks.material import write_jsonl
from tests.helpers import changed, write_recipe

PERPLEXITY = "perplexity.held-out"
ROUNDED = [{"kind": "round_to_nearest", "bits": 4, "group_size": "channel"}]


def with_windows(recipe: dict[str, Any], first: int, most: int | None, margin: float, **more: Any) -> dict[str, Any]:
    sets = [{**spec, "windows": first, "max_windows": most} for spec in recipe["evaluation"]]
    gate = {"kind": "non_inferiority", "measure": PERPLEXITY, "margin": margin}
    return changed(recipe, stages=ROUNDED, calibration=None, evaluation=sets, gates=[gate], **more)


@pytest.fixture
def ran(here, tmp_path):
    """ran(recipe) -> (exit code, report)."""

    def run(recipe: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        ended = here("run", write_recipe(tmp_path / "r.yaml", recipe), "--store", tmp_path / "store", "--json")
        assert ended.code in (0, 3, 4), ended.err
        return ended.code, json.loads(ended.out)

    return run


def test_more_windows_give_what_they_would_have_given_at_once(ran, glass_recipe):
    _, whole = ran(with_windows(glass_recipe, 13, None, 0.5))
    observed = next(gate for gate in whole["gates"] if gate["kind"] == "non_inferiority")["observed"]
    _, grown = ran(with_windows(glass_recipe, 3, 13, observed))  # at the margin: no look can decide
    gate = next(gate for gate in grown["gates"] if gate["kind"] == "non_inferiority")
    assert "Look 3 of at most 3, each at alpha 0.02" in gate["sentence"] and gate["units"] == 13
    assert grown["looks"] == [{"name": "held-out", "looks": 3, "units": 13, "most": 13}]
    for side in ("source", "compressed"):
        for name, value in whole["measurements"][side].items():
            if name.startswith(("perplexity", "divergence", "weight_bytes", "round_trip", "resident")):
                assert grown["measurements"][side][name] == pytest.approx(value, rel=1e-6), name
    assert grown["evaluation"][0]["digest"] == whole["evaluation"][0]["digest"]
    assert grown["evaluation"][0]["windows_obtained"] == 13


def test_a_gate_that_decides_asks_for_no_more(ran, glass_recipe):
    code, report = ran(with_windows(glass_recipe, 4, 16, 5.0))
    assert code == 0 and report["looks"] == [{"name": "held-out", "looks": 1, "units": 4, "most": 16}]
    assert "Look 1 of at most 3" in report["gates"][0]["sentence"]


def test_an_evaluation_looks_again_as_the_run_did(ran, here, glass_recipe, tmp_path):
    recipe = with_windows(glass_recipe, 4, 16, 0.5)
    code, report = ran(recipe)
    version = report["artifact"]["version"]
    arguments = ("--recipe", tmp_path / "r.yaml", "--store", tmp_path / "store", "--json")
    ended = here("eval", f"glass-int4@{version}", *arguments)
    assert ended.code == code, ended.err
    judged = json.loads(ended.out)
    assert judged["looks"] == report["looks"]
    assert [gate["sentence"] for gate in judged["gates"]] == [gate["sentence"] for gate in report["gates"]]


def test_a_gate_that_failed_ends_the_asking(ran, glass_recipe):
    recipe = with_windows(glass_recipe, 4, 16, 0.0001)
    recipe["gates"].append({"kind": "threshold", "measure": "weight_bytes", "max": 1})
    code, report = ran(recipe)
    assert code == 3 and report["looks"][0]["looks"] == 1


def test_more_items_are_asked_of_both_models_and_all_are_kept(ran, glass_recipe, tmp_path):
    items = [
        {"id": str(at), "context": f"item {at} of many:", "choices": ["one", "two"], "answer": at % 2}
        for at in range(40)
    ]
    write_jsonl(tmp_path / "many.jsonl", items)
    task = {"kind": "task", "name": "many", "file": "many.jsonl", "items": 10, "max_items": 40}
    gate = {"kind": "non_inferiority", "measure": "task.many.accuracy", "margin": 0.001}
    recipe = changed(glass_recipe, stages=ROUNDED, calibration=None, gates=[gate])
    recipe["evaluation"] = [*recipe["evaluation"], task]
    _, report = ran(recipe)
    assert report["looks"][0]["looks"] > 1
    (record,) = report["tasks"]
    rows = [
        json.loads(line)
        for line in (Path(report["artifact"]["path"]) / record["items_file"]).read_text(encoding="utf-8").splitlines()
    ]
    units = report["looks"][0]["units"]
    assert len(rows) == record["items"] == units and len({row["id"] for row in rows}) == units
    right = sum(row["compressed"]["correct"] for row in rows) / units
    assert record["accuracy_compressed"] == right == report["measurements"]["compressed"]["task.many.accuracy"]


def test_fewer_most_than_first_is_a_mistake(here, glass_recipe, tmp_path):
    path = write_recipe(tmp_path / "r.yaml", with_windows(glass_recipe, 8, 4, 0.1))
    ended = here("validate", path)
    assert ended.code == 2 and "max_windows 4 is less than windows 8" in ended.err


def test_the_plan_judges_power_at_the_last_look(here, glass_recipe, tmp_path):
    powers = {}
    for most in (None, 16):
        path = write_recipe(tmp_path / f"{most}.yaml", with_windows(glass_recipe, 4, most, 0.05))
        ended = here("plan", path, "--store", tmp_path / "store", "--json")
        (powers[most],) = json.loads(ended.out)["gate_power"]
    assert powers[16]["power"] > powers[None]["power"] and powers[16]["units"] == "4 to 16 windows of 128 tokens"
