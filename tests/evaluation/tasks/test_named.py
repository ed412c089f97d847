"""Tasks of lm-eval's own, as a hub would give them: limits, comparable kinds, and answers by item."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

from compress.errors import RecipeError
from compress.evaluation.tasks import harness
from compress.evaluation.tasks.language_model import AnsweringLM
from compress.evaluation.tasks.prepare import prepare
from compress.evaluation.tasks.question import named_task
from compress.evaluation.tasks.results import from_records
from compress.evaluation.tasks.spec import Task
from tests.evaluation.tasks.material import CHOICES, Folder


def built(**changes: Any) -> Any:
    """A task as lm-eval's YAML files describe them, with Jinja templates."""
    with harness.quiet():
        from datasets import Dataset
        from lm_eval.api.task import ConfigurableTask

        config = {
            "task": "own",
            "custom_dataset": lambda **_: {"validation": Dataset.from_list(CHOICES)},
            "validation_split": "validation",
            "output_type": "multiple_choice",
            "doc_to_text": "Say: {{context}}",
            "doc_to_target": "{{choices[0]}}",
            "doc_to_choice": "choices",
            **changes,
        }
        return ConfigurableTask(config={key: value for key, value in config.items() if value is not None})


@pytest.fixture(autouse=True)
def _one_type_a_column(monkeypatch):
    for item in CHOICES:
        monkeypatch.setitem(item, "answer", 0)


@pytest.fixture
def tokenizer(glass: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(glass)


def offered(monkeypatch: pytest.MonkeyPatch, *tasks: Any) -> None:
    named = {f"own{number}": task for number, task in enumerate(tasks)}
    monkeypatch.setattr(harness, "load_named", lambda name: {"tasks": named, "groups": {}})
    monkeypatch.setattr(harness, "known_names", lambda: ["own"])


def test_some_items_of_a_named_task_are_asked_and_answered(monkeypatch, tokenizer, glass):
    offered(monkeypatch, built())
    spec = Task(task="own", items=3, normalise=True)
    prepared = prepare(spec, tokenizer, 128, 0)
    assert prepared.available == 6 and len(prepared.ids) == 3 and prepared.ids == tuple(map(str, prepared.positions))
    assert prepared.contexts[0] == f"Say: {CHOICES[prepared.positions[0]]['context']}"
    lm = AnsweringLM(tokenizer, Folder(glass, tokenizer))
    records = harness.ask(prepared.question, lm, prepared.positions, False, 0)
    answers = from_records(prepared.question, prepared.ids, records)
    for position, asked, answer in zip(prepared.positions, answers.asked, answers.answers, strict=True):
        assert asked.choices == tuple(CHOICES[position]["choices"]) and asked.answer_index == 0
        assert answer.correct == (max(answer.loglikelihoods) == answer.loglikelihoods[0])
        assert answer.correct_norm is not None


def test_limits_above_what_there_is_are_refused(monkeypatch, tokenizer):
    offered(monkeypatch, built())
    with pytest.raises(RecipeError, match="items is 7, lm-eval's own has 6"):
        prepare(Task(task="own", items=7), tokenizer, 128, 0)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"output_type": "loglikelihood_rolling", "doc_to_choice": None}, "is no question with an answer"),
        (
            {
                "output_type": "generate_until",
                "doc_to_choice": None,
                "generation_kwargs": {"until": ["x"], "do_sample": True, "temperature": 0.7},
            },
            "it samples its text",
        ),
        (
            {"metric_list": [{"metric": "mcc", "aggregation": "matthews_corrcoef", "higher_is_better": True}]},
            "it is scored by mcc; tasks scored by acc or exact_match",
        ),
    ],
)
def test_what_cannot_be_compared_by_item_is_refused(monkeypatch, changes, says):
    offered(monkeypatch, built(**changes))
    with pytest.raises(RecipeError, match=says):
        named_task(Task(task="own"))


def test_a_group_is_refused_with_the_names_in_it(monkeypatch):
    offered(monkeypatch, built(), built())
    with pytest.raises(RecipeError, match=r"a group of 2 tasks; name them one by one, e\.g\. own0, own1"):
        named_task(Task(task="own"))
