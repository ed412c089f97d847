"""Prompts by the command: both models answer, side by side in every face of the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from compress.evaluation.prompts.spec import OWN
from tests.helpers import changed, write_recipe


@pytest.fixture
def asking(glass_recipe: dict[str, Any]) -> dict[str, Any]:
    """The glass recipe, rounded to 2 bits so that answers change, with our own prompts."""
    stages = [{"kind": "round_to_nearest", "bits": 2, "group_size": "channel"}]
    gates = [{"kind": "threshold", "measure": "weight_bytes", "max": 10**9}]
    recipe = changed(glass_recipe, calibration=None, stages=stages, gates=gates)
    recipe["evaluation"] = [*recipe["evaluation"], {"kind": "prompts", "max_new_tokens": 12}]
    return recipe


def test_answers_are_in_every_face_and_the_source_is_asked_once(asking, here, tmp_path):
    path = write_recipe(tmp_path / "r.yaml", asking)
    first = here("run", path, "--store", tmp_path / "store", "--json")
    assert first.code == 0, first.err
    report = json.loads(first.out)
    pairs = report["answers"]["pairs"]
    assert [pair["id"] for pair in pairs] == [prompt.id for prompt in OWN]
    assert any(pair["source"] != pair["compressed"] for pair in pairs) and any(pair["source"] for pair in pairs)
    assert report["answers"]["chat_template"] is None  # glass has none, and `auto` took it so
    folder = Path(report["artifact"]["path"]) / "reports"
    for face in ("report.html", "report.md"):
        text = (folder / face).read_text(encoding="utf-8")
        assert "Answers side by side" in text and "No gate looks at these answers" in text
    assert "<mark>" in (folder / "report.html").read_text(encoding="utf-8")

    again = json.loads(here("run", path, "--store", tmp_path / "store", "--json").out)
    assert again["answers"] == report["answers"]
    assert "prompts" in [event["where"] for event in again["events"] if event["kind"] == "baseline_reused"]

    judged = here("eval", "glass-int4", "--recipe", path, "--store", tmp_path / "store", "--json")
    assert json.loads(judged.out)["answers"] == report["answers"]


def test_the_sources_answers_are_what_transformers_writes(asking, here, tmp_path, glass):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    report = json.loads(
        here("run", write_recipe(tmp_path / "r.yaml", asking), "--store", tmp_path / "store", "--json").out
    )
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(glass, dtype=torch.float32),
        AutoTokenizer.from_pretrained(glass),
    )
    for pair in report["answers"]["pairs"][:3]:
        ids = tokenizer(pair["prompt"], return_tensors="pt")
        new = model.generate(**ids, do_sample=False, max_new_tokens=12, pad_token_id=0)[0, ids["input_ids"].shape[1] :]
        assert tokenizer.decode(new, skip_special_tokens=True) == pair["source"]


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"file": "nowhere.jsonl"}, "nowhere.jsonl: no such file"),
        ({"chat_template": True}, "the tokenizer of"),
        ({"max_new_tokens": 1000}, "the model's context is 128"),
    ],
)
def test_prompts_that_cannot_be_asked_end_with_2_before_any_stage(asking, here, tmp_path, spec, said):
    asking["evaluation"][-1] |= spec
    ended = here("run", write_recipe(tmp_path / "r.yaml", asking), "--store", tmp_path / "store")
    assert ended.code == 2 and said in ended.err
    assert not list((tmp_path / "store").glob("glass-int4/*"))


def test_no_gate_can_name_prompts_and_they_are_asked_once(asking, here, tmp_path):
    asking["evaluation"].append({"kind": "prompts"})
    asking["gates"] = [{"kind": "threshold", "measure": "prompts.same", "min": 1}]
    ended = here("validate", write_recipe(tmp_path / "r.yaml", asking))
    assert ended.code == 2 and "prompts are asked twice" in ended.err and "nothing measures 'prompts.same'" in ended.err
