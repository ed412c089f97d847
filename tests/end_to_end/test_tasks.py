"""A run with tasks, by the command: both models asked, every answer in the artifact, the source asked once."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.evaluation.tasks.material import CHOICES, CLOZE, write_jsonl
from tests.helpers import changed, write_recipe

pytest.importorskip("lm_eval")


@pytest.fixture
def asking(glass_recipe: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """The glass recipe, rounded to 2 bits so that answers change, with a task of each type."""
    write_jsonl(tmp_path / "choices.jsonl", CHOICES)
    write_jsonl(tmp_path / "cloze.jsonl", CLOZE)
    write_jsonl(tmp_path / "text.jsonl", [{**item, "answer": "x"} for item in CLOZE if item["context"]])
    tasks = [
        {"kind": "task", "name": "choices", "file": "choices.jsonl", "normalise": True, "few_shot": 1, "items": 4},
        {"kind": "task", "name": "cloze", "file": "cloze.jsonl", "type": "cloze"},
        {"kind": "task", "name": "text", "file": "text.jsonl", "type": "generation", "max_new_tokens": 4},
    ]
    return changed(
        glass_recipe,
        calibration=None,
        stages=[{"kind": "round_to_nearest", "bits": 2, "group_size": "channel"}],
        evaluation=[*glass_recipe["evaluation"], *tasks],
        gates=[{"kind": "threshold", "measure": "task.choices.accuracy", "min": 0.0}],
    )


def test_every_answer_of_both_models_is_in_the_artifact(asking, here, tmp_path):
    ended = here("run", write_recipe(tmp_path / "r.yaml", asking), "--store", tmp_path / "store", "--json")
    assert ended.code in (0, 3), ended.err
    report = json.loads(ended.out)
    artifact = Path(report["artifact"]["path"])
    assert [task["name"] for task in report["tasks"]] == ["choices", "cloze", "text"]
    assert {"task.choices.accuracy", "task.choices.accuracy_norm", "task.cloze.nll", "task.text.accuracy"} <= set(
        report["measurements"]["source"]
    )
    listed = {entry["path"] for entry in json.loads((artifact / "manifest.json").read_text(encoding="utf-8"))["files"]}
    for task in report["tasks"]:
        assert task["items_file"] in listed
        rows = [json.loads(line) for line in (artifact / task["items_file"]).read_text(encoding="utf-8").splitlines()]
        assert len(rows) == task["items"]
        right = sum(row["compressed"]["correct"] for row in rows)
        assert (
            right / len(rows)
            == task["accuracy_compressed"]
            == report["measurements"]["compressed"][f"task.{task['name']}.accuracy"]
        )
        assert sum(row["flip"] for row in rows) == task["lost"] + task["gained"]
        assert all(row["flip"] == (row["source"]["correct"] != row["compressed"]["correct"]) for row in rows)
        lost, flips = task["lost"], task["lost"] + task["gained"]
        tail = sum(math.comb(flips, count) for count in range(lost, flips + 1)) / 2**flips
        assert task["degraded_p"] == pytest.approx(tail)
    assert [task["items"] for task in report["tasks"]] == [4, 6, 5]
    assert report["tasks"][0]["few_shot"] == 1 and report["tasks"][0]["available"] == 5
    for face in ("report.html", "report.md"):
        text = (artifact / "reports" / face).read_text(encoding="utf-8")
        assert "Tasks" in text and "choices" in text
    assert report["measurements"]["intervals"]["task.choices.accuracy"][1] <= 1


def test_the_source_is_asked_once_and_another_recipe_with_the_same_text_reuses_it(asking, here, tmp_path):
    first = here("run", write_recipe(tmp_path / "r.yaml", asking), "--store", tmp_path / "store", "--json")
    again = changed(asking, name="again")
    again["evaluation"] = [entry for entry in asking["evaluation"] if entry.get("name") != "cloze"]
    ended = here("run", write_recipe(tmp_path / "a.yaml", again), "--store", tmp_path / "store", "--json")
    before, after = json.loads(first.out), json.loads(ended.out)
    reused = [event["where"] for event in after["events"] if event["kind"] == "baseline_reused"]
    assert reused == ["source", "choices", "text"]
    assert (
        after["measurements"]["source"]["task.choices.accuracy"]
        == (before["measurements"]["source"]["task.choices.accuracy"])
    )


def test_a_source_below_its_floor_ends_with_5_before_any_stage(asking, here, tmp_path):
    asking["evaluation"][-1]["floor"] = 0.9
    ended = here("run", write_recipe(tmp_path / "r.yaml", asking), "--store", tmp_path / "store")
    assert ended.code == 5
    assert "0.0% on text, its floor is 90.0%" in ended.err and "nothing was compressed" in ended.err
    assert not list((tmp_path / "store").glob("glass-int4/*"))


def test_mistakes_of_all_task_files_are_reported_together_with_their_lines(asking, here, tmp_path):
    write_jsonl(tmp_path / "choices.jsonl", [CHOICES[0], {**CHOICES[1], "id": "a", "answer": "Spades"}])
    (tmp_path / "cloze.jsonl").write_text("{oops\n", encoding="utf-8")
    (tmp_path / "text.jsonl").unlink()
    ended = here("run", write_recipe(tmp_path / "r.yaml", asking), "--store", tmp_path / "store")
    assert ended.code == 2
    for part in ("choices.jsonl:2: answer 'Spades'", "cloze.jsonl:1: not JSON", "text.jsonl: no such file"):
        assert part in ended.err.replace("\n", "")


def test_a_chat_template_that_is_not_there_is_refused(asking, here, tmp_path):
    asking["evaluation"][2]["chat_template"] = True
    ended = here("run", write_recipe(tmp_path / "r.yaml", asking), "--store", tmp_path / "store")
    assert ended.code == 2 and "task choices: chat_template is asked for" in ended.err


def test_without_lm_eval_the_plan_ends_with_7_and_names_the_command(asking, here, tmp_path, monkeypatch):
    monkeypatch.setattr("compress.evaluation.tasks.harness._found", lambda name: False)
    ended = here("plan", write_recipe(tmp_path / "r.yaml", asking), "--store", tmp_path / "store")
    assert ended.code == 7 and "pip install 'lm_eval>=0.4.13'" in ended.err


def test_questions_that_were_calibrated_on_are_refused(asking, texts, glass_recipe, here, tmp_path):
    lines = (texts / "calibration.jsonl").read_text(encoding="utf-8").splitlines()
    items = [
        {"id": number, "context": json.loads(line)["text"][:150], "answer": "x"} for number, line in enumerate(lines)
    ]
    write_jsonl(tmp_path / "cloze.jsonl", items)
    leaking = changed(asking, calibration=glass_recipe["calibration"], stages=glass_recipe["stages"])
    ended = here("run", write_recipe(tmp_path / "r.yaml", leaking), "--store", tmp_path / "store")
    assert ended.code == 2 and "tasks overlap calibration text: cloze" in ended.err


def test_text_is_not_generated_where_the_model_does_not_fit_and_a_gate_on_it_fails(asking, here, tmp_path, monkeypatch):
    monkeypatch.setattr("compress.steps.tasks.fits", lambda *_: False)
    asking["gates"] = [{"kind": "threshold", "measure": "task.text.accuracy", "min": 0.0}]
    ended = here("run", write_recipe(tmp_path / "r.yaml", asking), "--store", tmp_path / "store", "--json")
    report = json.loads(ended.out)
    assert ended.code == 3 and report["gates"][0]["observed"] is None
    assert [event["where"] for event in report["events"] if event["kind"] == "task_skipped"] == ["text"]
    assert [task["name"] for task in report["tasks"]] == ["choices", "cloze"]


def test_an_export_whose_tokenizer_asks_something_else_is_refused(asking, here, tmp_path, monkeypatch):
    from compress.steps.source import load_tokenizer

    def other(folder: Path) -> Any:
        tokenizer = load_tokenizer(folder)
        tokenizer.add_tokens(["beginning to get"])
        return tokenizer

    monkeypatch.setattr("compress.steps.tasks.load_tokenizer", other)
    ended = here("run", write_recipe(tmp_path / "r.yaml", asking), "--store", tmp_path / "store")
    assert ended.code == 2 and "gives other prompts than the source's" in " ".join(ended.err.split())
    assert not list((tmp_path / "store").glob("glass-int4/v*"))
