"""Ways to a wrong verdict that were found by trying: each stays closed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.helpers import changed, write_recipe


def tasks(folder: Path, count: int = 60, **changes: Any) -> Path:
    lines = [
        {
            "id": f"q{index}",
            "context": f"Number {index} is",
            "choices": [" even", " odd"],
            "answer": index % 2,
            **changes,
        }
        for index in range(count)
    ]
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture
def asking(glass_recipe: dict[str, Any], tmp_path: Path) -> Callable[..., Path]:
    """asking(gates, *more evaluations) writes a data-free recipe of glass with a task of 60 questions."""

    def write(gates: list[dict[str, Any]], *more: dict[str, Any], **task: Any) -> Path:
        evaluation = [
            glass_recipe["evaluation"][0],
            {"kind": "task", "name": "parity", "file": str(tasks(tmp_path)), **task},
            *more,
        ]
        stages = [{"kind": "round_to_nearest", "bits": 8, "group_size": "channel"}]
        recipe = changed(glass_recipe, evaluation=evaluation, gates=gates, stages=stages, calibration=None)
        return write_recipe(tmp_path / "r.yaml", recipe)

    return write


def test_a_further_look_keeps_what_was_measured_once(asking, here, tmp_path):
    """Latency is timed once; a second look at the items must not lose it, nor its interval."""
    gates = [
        {"kind": "non_inferiority", "measure": "task.parity.accuracy", "margin": 0.001},
        {"kind": "latency", "what": "decode", "max_ratio": 1000},
        {"kind": "relative", "measure": "latency.prefill_seconds", "max_ratio": 1000, "use_interval": True},
    ]
    path = asking(gates, {"kind": "latency", "prompt_tokens": 8, "new_tokens": 4}, items=20, max_items=60)
    ended = here("run", path, "--store", tmp_path / "store", "--json")
    report = json.loads(ended.out)
    assert report["looks"], "the accuracy gate must have asked for more"
    first, second = (gate for gate in report["gates"] if gate["kind"] in ("latency", "relative"))
    assert first["verdict"] == second["verdict"] == "passed" and second["interval"] is not None
    assert ended.code == 4


def with_nan(glass: Path, folder: Path) -> Path:
    shutil.copytree(glass, folder)
    (weights,) = folder.glob("*.safetensors")
    tensors = load_file(weights)
    name = next(name for name in tensors if name.endswith("down_proj.weight"))
    tensors[name][0, 0] = float("nan")
    save_file(tensors, weights, {"format": "pt"})
    return folder


def test_a_model_of_nan_passes_nothing(glass, asking, here, tmp_path):
    path = asking([{"kind": "size", "max_ratio": 1.5}])
    ended = here("eval", with_nan(glass, tmp_path / "nan"), "--recipe", path, "--json")
    report = json.loads(ended.out)
    assert ended.code == 3 and not report["round_trip"]["passed"]


def test_a_task_that_the_source_cannot_do_decides_nothing(asking, here, tmp_path):
    questions = tasks(tmp_path, answer=0)
    lines = [json.loads(line) for line in questions.read_text().splitlines()]
    for line in lines:
        line["choices"], line["answer"] = [], "zzzz qqqq xxxx"
    hard = tmp_path / "hard.jsonl"
    hard.write_text("".join(json.dumps(line) + "\n" for line in lines))
    path = asking(
        [{"kind": "non_inferiority", "measure": "task.hard.accuracy", "margin": 0.2}],
        {"kind": "task", "name": "hard", "type": "cloze", "file": str(hard)},
    )
    ended = here("run", path, "--store", tmp_path / "store", "--json")
    (gate,) = (gate for gate in json.loads(ended.out)["gates"] if gate["kind"] == "non_inferiority")
    assert ended.code == 4 and gate["verdict"] == "inconclusive" and "any model would pass" in gate["sentence"]


def test_copies_of_a_question_are_refused(asking, here, tmp_path):
    gates = [{"kind": "non_inferiority", "measure": "task.parity.accuracy", "margin": 0.1}]
    path = asking(gates)
    tasks(tmp_path, context="The same question is")
    ended = here("plan", path)
    assert ended.code == 2 and "asks what line 1 asks" in ended.err


def test_copies_of_a_window_are_left_out(glass_recipe, here, tmp_path):
    text = tmp_path / "same.jsonl"
    lines = [{"text": "One and the same sentence, which says nothing new the second time. " * 8}] * 12
    lines += [
        {"text": f"A sentence of its own, number {index}, about something else again. " * 8} for index in range(4)
    ]
    text.write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = {"kind": "files", "paths": [str(text)]}
    evaluation = [
        {"kind": "perplexity", "data": data, "set": "same", "layout": "padded", "windows": 16, "window_tokens": 64}
    ]
    gates = [{"kind": "relative", "measure": "perplexity.same", "max_ratio": 5}]
    stages = [{"kind": "round_to_nearest", "bits": 8, "group_size": "channel"}]
    recipe = changed(glass_recipe, evaluation=evaluation, gates=gates, stages=stages, calibration=None)
    report = json.loads(here("run", write_recipe(tmp_path / "r.yaml", recipe), "--store", tmp_path / "s", "--json").out)
    (event,) = (event for event in report["events"] if event["kind"] == "windows_repeated")
    assert event["data"]["windows"] == 11
    assert report["evaluation"][0]["windows_obtained"] == 5


def test_a_task_cannot_be_called_as_a_text_is(asking, here):
    gates = [{"kind": "relative", "measure": "perplexity.held-out", "max_ratio": 5}]
    ended = here("validate", asking(gates, name="held-out"))
    assert ended.code == 2 and "both called 'held-out'" in ended.err


def test_calibration_text_that_changed_since_is_not_taken_for_what_was_read(glass_recipe, texts, here, tmp_path):
    mine = tmp_path / "calibration.jsonl"
    shutil.copyfile(texts / "calibration.jsonl", mine)
    calibration = {**glass_recipe["calibration"], "data": {"kind": "files", "paths": [str(mine)]}}
    path = write_recipe(tmp_path / "r.yaml", changed(glass_recipe, calibration=calibration))
    assert here("run", path, "--store", tmp_path / "store").code == 0
    lines = mine.read_text(encoding="utf-8").splitlines()
    mine.write_text("\n".join(reversed(lines)) + "\n", encoding="utf-8")
    ended = here("eval", "glass-int4", "--recipe", path, "--store", tmp_path / "store", "--json")
    assert json.loads(ended.out)["event_counts"]["calibration_unknown"] == 1


def test_where_no_gate_of_the_recipe_decides_a_model_does_not_pass(glass, asking, here):
    ended = here("eval", glass, "--recipe", asking([{"kind": "events", "event": "rounding_fallback"}]), "--json")
    assert ended.code == 4 and json.loads(ended.out)["verdict"] == "inconclusive"


def test_an_older_junit_file_does_not_outlive_an_error(asking, here, tmp_path):
    old = tmp_path / "junit.xml"
    old.write_text("<testsuites/>")
    path = asking([{"kind": "relative", "measure": "perplexity.held-out", "max_ratio": 5}])
    ended = here("eval", tmp_path / "nowhere.gguf", "--recipe", path, "--junit", old)
    assert ended.code == 2 and not old.exists()


def test_a_summary_that_cannot_be_written_does_not_change_the_verdict(glass, asking, here, tmp_path, monkeypatch):
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "no" / "such" / "folder"))
    path = asking([{"kind": "relative", "measure": "perplexity.held-out", "max_ratio": 5}])
    ended = here("eval", glass, "--recipe", path, "--github", "--json")
    assert ended.code == 0 and json.loads(ended.out)["verdict"] == "passed" and "cannot be written" in ended.err


def test_half_a_character_is_a_mistake_with_its_line(asking, here, tmp_path):
    path = asking([{"kind": "non_inferiority", "measure": "task.parity.accuracy", "margin": 0.1}])
    (tmp_path / "questions.jsonl").write_text('{"id": "a", "context": "\\ud800", "choices": ["b", "c"], "answer": 0}\n')
    ended = here("validate", path)
    assert ended.code == 2 and "questions.jsonl:1" in ended.err and "surrogate" in ended.err
