"""The dry run: prompts as tokens, mistakes that need the tokenizer, and digests that stand for what is asked."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

from compress.errors import EnvironmentLacksError, RecipeError
from compress.evaluation.tasks import harness
from compress.evaluation.tasks.prepare import prepare, tokens_asked
from compress.evaluation.tasks.question import named_task
from compress.evaluation.tasks.spec import Task
from tests.evaluation.tasks.material import CHOICES, CLOZE, write_jsonl

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


@pytest.fixture
def tokenizer(glass: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(glass)


@pytest.fixture
def spec(tmp_path: Path) -> Task:
    return Task(name="t", file=write_jsonl(tmp_path / "t.jsonl", CHOICES))


def prompts(spec: Task, tokenizer: Any, seed: int = 0) -> list[tuple[str, str]]:
    """The texts that lm-eval asks for."""
    from compress.evaluation.tasks.language_model import Recorder

    prepared = prepare(spec, tokenizer, 128, seed)
    records = harness.ask(prepared.question, Recorder(tokenizer), None, spec.chat_template, seed)
    return [tuple(pair[:2]) for record in records for pair in record["arguments"]]


def test_braces_and_templates_in_items_stay_text(tokenizer, tmp_path):
    lines = [{"id": 1, "context": "{{ 7*7 }} {% if %}", "choices": ["{{ id }}", "[1, 2]"], "answer": 1}]
    spec = Task(name="t", file=write_jsonl(tmp_path / "t.jsonl", lines))
    assert prompts(spec, tokenizer) == [("{{ 7*7 }} {% if %}", " {{ id }}"), ("{{ 7*7 }} {% if %}", " [1, 2]")]


def test_examples_stand_before_every_question_with_their_answers(tokenizer, tmp_path):
    shots = write_jsonl(tmp_path / "s.jsonl", [{"id": "x", "context": "One and", "choices": ["a", "two"], "answer": 1}])
    file = write_jsonl(tmp_path / "t.jsonl", CHOICES[:2])
    spec = Task(name="t", file=file, few_shot=1, few_shot_file=shots)
    assert {context for context, _ in prompts(spec, tokenizer)} == {
        f"One and two\n\n{item['context']}" for item in CHOICES[:2]
    }
    cloze = write_jsonl(tmp_path / "c.jsonl", CLOZE[:2])
    shots = write_jsonl(tmp_path / "cs.jsonl", [{"id": "x", "context": "One and", "answer": "two"}])
    spec = Task(name="t", file=cloze, type="cloze", few_shot=1, few_shot_file=shots)
    assert prompts(spec, tokenizer)[0] == ("One and two\n\nAlice was beginning to get very", " tired")


def test_a_chat_template_wraps_the_question_and_takes_the_delimiters_place(tokenizer, spec, tmp_path):
    tokenizer.chat_template = TEMPLATE
    asked = prompts(spec.model_copy(update={"chat_template": True}), tokenizer)
    assert asked[0] == ("<user>Alice was beginning to get very\n<a>", "tired")
    cloze = Task(name="t", file=write_jsonl(tmp_path / "c.jsonl", CLOZE), type="cloze", chat_template=True)
    assert prompts(cloze, tokenizer)[0] == ("<user>Alice was beginning to get very\n<a>", "tired")


def test_a_missing_chat_template_is_refused(tokenizer, spec):
    with pytest.raises(RecipeError, match="task t: chat_template is asked for"):
        prepare(spec.model_copy(update={"chat_template": True}), tokenizer, 128, 0)


def test_the_digest_changes_with_items_examples_template_and_tokenizer(tokenizer, spec, tmp_path):
    prepared = prepare(spec, tokenizer, 128, 0)
    assert prepare(spec, tokenizer, 128, 0).digest == prepared.digest == tokens_asked(prepared, tokenizer, 0)
    others = [spec.model_copy(update=change) for change in ({"items": 5}, {"few_shot": 1}, {"delimiter": ""})]
    changed = [{**item, "answer": 1} for item in CHOICES]
    others.append(Task(name="t", file=write_jsonl(tmp_path / "u.jsonl", changed)))
    digests = {prepare(other, tokenizer, 128, 0).digest for other in others}
    assert len(digests | {prepared.digest}) == 5
    tokenizer.add_tokens(["beginning to get"])
    assert tokens_asked(prepared, tokenizer, 0) != prepared.digest


def test_questions_longer_than_the_context_are_named(tokenizer, spec):
    with pytest.raises(RecipeError, match=r"t\.jsonl:6: item f: 18 tokens with its answer, the model's context is 12"):
        prepare(spec, tokenizer, 12, 0)


def test_room_for_generated_text_counts_as_context(tokenizer, tmp_path):
    file = write_jsonl(tmp_path / "c.jsonl", [CLOZE[0]])
    spec = Task(name="t", file=file, type="generation", max_new_tokens=125)
    with pytest.raises(
        RecipeError, match=r"c\.jsonl:1: item a: \d+ tokens with its answer, the model's context is 128"
    ):
        prepare(spec, tokenizer, 128, 0)
    assert prepare(spec.model_copy(update={"max_new_tokens": 20}), tokenizer, 128, 0).generates


def test_choices_that_tokenise_to_nothing_are_named(spec, tokenizer, monkeypatch):
    from compress.evaluation.tasks.language_model import PromptLM

    whole = PromptLM.encode_request

    def nothing(self: Any, context: str, continuation: str) -> tuple[list[int], list[int]]:
        before, after = whole(self, context, continuation)
        return before, [] if continuation == " x" else after

    monkeypatch.setattr(PromptLM, "encode_request", nothing)
    with pytest.raises(RecipeError, match=r"t\.jsonl:1: item a: choice 2 tokenises to nothing"):
        prepare(spec, tokenizer, 128, 0)


def test_lm_eval_says_nothing_on_stdout_or_stderr(spec, tokenizer, capfd):
    import random

    state = random.getstate()
    prepare(spec.model_copy(update={"few_shot": 2}), tokenizer, 128, 0)
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")
    assert random.getstate() == state, "the process's own randomness is left alone"


def test_an_unknown_name_is_answered_with_the_nearest(monkeypatch):
    monkeypatch.setattr(harness, "known_names", lambda: ["hellaswag", "lambada_openai"])
    with pytest.raises(RecipeError, match=r'no such task\. Did you mean "hellaswag"'):
        named_task(Task(task="helaswag"))


def test_a_path_is_no_name_of_a_task_because_its_file_could_name_code(monkeypatch, tmp_path):
    (tmp_path / "evil.yaml").write_text("task: evil\ncustom_dataset: !function code.run\n")
    monkeypatch.setattr(harness, "known_names", lambda: ["hellaswag"])
    with pytest.raises(RecipeError, match="no such task"):
        named_task(Task(task=str(tmp_path / "evil.yaml")))


def test_a_named_task_without_its_data_is_a_lack_of_the_environment(monkeypatch):
    monkeypatch.setattr(harness, "known_names", lambda: ["hellaswag"])

    def offline(name: str) -> Any:
        raise ConnectionError("offline mode")

    monkeypatch.setattr(harness, "load_named", offline)
    with pytest.raises(EnvironmentLacksError, match=r"its data cannot be loaded \(offline mode\)"):
        named_task(Task(task="hellaswag"))


def test_without_the_package_the_pip_command_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(EnvironmentLacksError, match=r"pip install 'lm_eval>=0\.4\.13'"):
        harness.require()
