"""scripts/get_tasks.py on small made-up packages: what becomes an item, and that items are valid and reproducible."""

from __future__ import annotations

import json
import sys
from types import ModuleType

import pytest

from compress.evaluation.tasks.items import read_items
from tests.helpers import PROJECT


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(PROJECT / "scripts"))
    import get_tasks

    yield get_tasks
    sys.modules.pop("get_tasks", None)
    sys.modules.pop("get_texts", None)


def entry(country: str, capital: str) -> str:
    names = {"conventional short form": {"text": country}}
    return json.dumps({"Government": {"Country name": names, "Capital": {"name": {"text": capital}}}})


def valid(lines: list[dict], path, kind: str) -> bool:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    items, mistakes = read_items(path, kind)
    return not mistakes and len(items) == len(lines)


def test_capitals_are_asked_with_wrong_ones_of_the_same_region(script, tmp_path):
    europe = {"fr": ("France", "Paris"), "pl": ("Poland", "Warsaw"), "cy": ("Cyprus", "Nicosia (Lefkosia)")}
    europe |= {"nl": ("Netherlands", "Amsterdam; note - The Hague is the seat"), "mc": ("Monaco", "Monaco")}
    files = {f"europe/{code}.json": entry(*pair) for code, pair in europe.items()}
    files |= {"asia/jp.json": entry("Japan", "Tokyo"), "asia/xx.json": json.dumps({})}
    lines = list(script.capitals(files))
    assert [line["id"] for line in lines] == ["europe/fr", "europe/pl", "europe/cy", "europe/nl"]
    assert lines[0]["context"] == "The capital of France is"
    assert sorted(lines[0]["choices"]) == ["Amsterdam", "Nicosia", "Paris", "Warsaw"]
    assert [line["choices"][line["answer"]] for line in lines] == ["Paris", "Warsaw", "Nicosia", "Amsterdam"]
    assert lines == list(script.capitals(files)) and valid(lines, tmp_path / "t.jsonl", "multiple_choice")


def test_definitions_are_asked_for_common_nouns_with_words_of_the_same_file(script, tmp_path):
    words = [
        ("00000001", "dog", "a barker", 9),
        ("00000002", "cat", "a mewer", 8),
        ("00000003", "cow", "a cow-like", 7),
    ]
    words += [("00000004", "Hen", 'a layer; "eggs"', 6), ("00000005", "emu", "a runner", 4)]
    data = [f"{o} 05 n 01 {w} 0 001 @ 0 n 0 | {d}  " for o, w, d, _ in words]
    index = [f"{w.lower()}%1:05:00:: {o} 1 {seen}" for o, w, _, seen in words]
    files = {"dict/data.noun": "\n".join(["  1 licence", *data]), "dict/index.sense": "\n".join(index)}
    lines = list(script.wordnet(files))
    assert [line["context"] for line in lines] == [
        "Definition: a barker\nWord:",
        "Definition: a mewer\nWord:",
        "Definition: a layer\nWord:",
    ], "emu is rare, and cow's definition holds the word"
    assert all(sorted(line["choices"]) == ["Hen", "cat", "cow", "dog"] for line in lines)
    assert valid(lines, tmp_path / "t.jsonl", "multiple_choice")


def test_a_passage_ends_in_a_content_word_that_it_holds_before_its_last_sentence(script, tmp_path):
    filler = " ".join(f"word{number}/nn" for number in range(14))
    sentence = f"The/at garden/nn was/bedz {filler} ./."
    last = f"She/pps went/vbd {filler.replace('word', 'other')} to/in the/at garden/nn ./."
    lines = list(script.brown_cloze({"ck01": "\n\n".join([sentence, sentence, sentence, last])}))
    assert [line["answer"] for line in lines] == ["garden"]
    assert lines[0]["context"].endswith("to the") and lines[0]["context"].startswith("The garden was word0")
    assert valid(lines, tmp_path / "t.jsonl", "cloze")
    other = last.replace("She/pps", "garden/nn")
    assert not list(script.brown_cloze({"ck01": "\n\n".join([sentence, sentence, sentence, other])}))


def test_truthfulqas_right_answers_do_not_stand_first(script):
    case = {"question": "q?", "choices": ["right", "b", "c", "d", "e"], "expected_index": 0}
    text = "\n".join(json.dumps({**case, "id": f"i{number}"}) for number in range(20))
    lines = list(script.truthfulqa({"cases.jsonl": text}))
    assert all(line["choices"][line["answer"]] == "right" for line in lines)
    assert len({line["answer"] for line in lines}) > 2
