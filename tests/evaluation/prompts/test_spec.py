"""Prompts of a recipe, and every mistake of their file."""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from compress.evaluation.prompts.spec import MOST, OWN, Prompts, read_prompts


def test_our_own_prompts_are_as_many_as_people_read():
    prompts, mistakes = read_prompts(Prompts())
    assert prompts == OWN and not mistakes and 8 <= len(OWN) <= MOST
    assert len({prompt.id for prompt in OWN}) == len(OWN)


def test_a_file_of_prompts(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"id": "a", "prompt": "One?"}\n\n{"prompt": "Two?"}\n', encoding="utf-8")
    prompts, mistakes = read_prompts(Prompts(file=path))
    assert not mistakes and [(prompt.id, prompt.text) for prompt in prompts] == [("a", "One?"), ("3", "Two?")]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{oops", "not JSON"),
        ('["a"]', "write an object"),
        ('{"prompt": "x", "answer": "y"}', "and nothing else"),
        ('{"id": "b", "prompt": "  "}', "no `prompt`"),
        ('{"id": true, "prompt": "x"}', "not a text or a whole number"),
        ('{"id": "a", "prompt": "x"}', "used already"),
        (json.dumps({"prompt": "x" * 5000}), "at most 4000"),
    ],
)
def test_mistakes_are_told_with_their_line(tmp_path, line, said):
    path = tmp_path / "p.jsonl"
    path.write_text('{"id": "a", "prompt": "One?"}\n' + line + "\n", encoding="utf-8")
    _, (mistake,) = read_prompts(Prompts(file=path))
    assert mistake.startswith(f"{path}:2: ") and said in mistake


def test_no_file_an_empty_one_and_too_many(tmp_path):
    path = tmp_path / "p.jsonl"
    assert "no such file" in read_prompts(Prompts(file=path))[1][0]
    path.write_text("\n", encoding="utf-8")
    assert "the file is empty" in read_prompts(Prompts(file=path))[1][0]
    path.write_text("".join(f'{{"prompt": "p{at}"}}\n' for at in range(21)), encoding="utf-8")
    assert "21 prompts; people read at most 20" in read_prompts(Prompts(file=path))[1][0]


@pytest.mark.parametrize("fields", [{"max_new_tokens": 0}, {"max_new_tokens": 5000}, {"chat_template": "maybe"}])
def test_settings_that_mean_nothing_are_refused(fields):
    with pytest.raises(ValidationError):
        Prompts(**fields)
