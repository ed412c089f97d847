"""JSONL -> items, with every mistake named by file and line.

    {"id": "fr", "context": "The capital of France is", "choices": ["Lyon", "Paris"], "answer": "Paris"}

`answer` is the index or the text of a choice; without `choices` (cloze, generation) it is the text itself.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.evaluation.tasks.spec import Task, TaskType

MOST_MISTAKES = 20
"""Mistakes of one file that are spelled out; of more, only the number is told."""
_KEYS = {"id", "context", "choices", "answer"}


@dataclass(frozen=True)
class Item:
    """One question. `answer` is the index of a choice for multiple_choice, the text itself otherwise."""

    id: str
    context: str
    choices: tuple[str, ...]
    answer: int | str
    line: int
    """Of its file."""

    def to_json(self) -> dict[str, Any]:
        return {"id": self.id, "context": self.context, "choices": list(self.choices), "answer": self.answer}

    @property
    def characters(self) -> int:
        """Characters a model reads: the context once for each choice."""
        texts = self.choices or (str(self.answer),)
        return sum(len(self.context) + len(text) for text in texts)


@dataclass(frozen=True)
class Drawn:
    """The items a recipe asks, in file order, and the examples shown before each."""

    asked: tuple[Item, ...]
    """All that may be asked, `max_items` of them if that is given."""
    examples: tuple[Item, ...]
    available: int
    """Items of the file, less those that are shown as examples: how many could be asked."""
    ranks: tuple[int, ...] = ()
    """Of each of `asked`, when it was drawn: the first `items` are asked first."""


def read_items(path: Path, type_: TaskType) -> tuple[list[Item], list[str]]:
    """The items of a file, and its mistakes; neither is complete where there are mistakes."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        return [], [f"{path}: no such file"]
    except (OSError, UnicodeDecodeError) as error:
        return [], [f"{path}: cannot be read ({error})"]
    items: list[Item] = []
    mistakes: list[str] = []
    seen: dict[str, int] = {}
    asked: dict[tuple[str, tuple[str, ...]], int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        item, wrong = _item(line, number, type_)
        if item is not None and item.id in seen:
            wrong.append(f"id {item.id!r} was used on line {seen[item.id]} already")
        if item is not None and (question := (item.context, item.choices)) in asked:
            wrong.append(f"asks what line {asked[question]} asks; a copy is no further evidence")
        if item is not None:
            asked.setdefault((item.context, item.choices), number)
            seen.setdefault(item.id, number)
            items.append(item)
        mistakes += [f"{path}:{number}: {sentence}" for sentence in wrong]
    if not items and not mistakes:
        mistakes.append(f"{path}: the file is empty; a task needs items")
    if len(mistakes) > MOST_MISTAKES:
        mistakes[MOST_MISTAKES:] = [f"{path}: and {len(mistakes) - MOST_MISTAKES} more mistakes"]
    return items, mistakes


def unpaired_surrogate(line: str) -> bool:
    """Whether the texts of a line of JSON cannot be written as UTF-8."""
    try:
        json.dumps(json.loads(line), ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def _item(line: str, number: int, type_: TaskType) -> tuple[Item | None, list[str]]:
    """One line as an item, or None, and what is wrong with it."""
    try:
        data = json.loads(line)
    except ValueError as error:
        return None, [f"not JSON ({error})"]
    if unpaired_surrogate(line):
        return None, ["holds half of a character (an unpaired surrogate such as \\ud800), which no tokenizer reads"]
    if not isinstance(data, dict):
        return None, ["not a JSON object; write {id, context, choices, answer}"]
    wrong = [f"unknown key {key!r}; known: {', '.join(sorted(_KEYS))}" for key in sorted(set(data) - _KEYS)]
    identity, context = data.get("id", number), data.get("context")
    if not isinstance(identity, (str, int)) or isinstance(identity, bool) or identity == "":
        wrong.append("`id` is not a text or a whole number")
    if not isinstance(context, str):
        wrong.append("no `context`: it is the text before the answer, maybe empty")
    choices = data.get("choices", [])
    answer: int | str
    if type_ == "multiple_choice":
        answer, more = _choice(choices, data.get("answer"))
    else:
        answer, more = _text(choices, data.get("answer"), type_)
    wrong += more
    if wrong:
        return None, wrong
    return Item(str(identity), str(context), tuple(choices), answer, number), []


def _choice(choices: Any, answer: Any) -> tuple[int, list[str]]:
    """The index of the right choice."""
    if not isinstance(choices, list) or any(not isinstance(choice, str) for choice in choices):
        return 0, ["`choices` is not a list of texts"]
    wrong = []
    if len(choices) < 2:
        wrong.append(f"{len(choices)} choices; at least 2 are needed")
    wrong += [f"choice {choice!r} is given twice" for choice in sorted({c for c in choices if choices.count(c) > 1})]
    wrong += [f"choice {index} is empty" for index, choice in enumerate(choices) if not choice.strip()]
    if answer is None:
        return 0, [*wrong, "no `answer`: give the index or the text of the right choice"]
    if isinstance(answer, str) and answer in choices:
        return choices.index(answer), wrong
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        return answer, wrong
    known = ", ".join(repr(choice) for choice in choices[:6])
    return 0, [*wrong, f"answer {answer!r} is not among the choices ({known}), nor an index from 0"]


def _text(choices: Any, answer: Any, type_: str) -> tuple[str, list[str]]:
    """The text that is the answer."""
    wrong = [f"`choices` are for multiple_choice; a {type_} item has an answer only"] if choices else []
    if answer is None:
        return "", [*wrong, "no `answer`: give its text"]
    if not isinstance(answer, str) or not answer.strip():
        return "", [*wrong, f"answer {answer!r} is not a text"]
    return answer, wrong


def order(count: int, seed: int) -> list[int]:
    """Positions 0..count-1 in the order they are drawn: for the same seed more items always include fewer."""
    positions = list(range(count))
    random.Random(seed).shuffle(positions)
    return positions


def draw(spec: Task, seed: int) -> tuple[Drawn, list[str]]:
    """The items and examples of a local task, and all mistakes of its files and limits."""
    assert spec.file is not None
    items, mistakes = read_items(spec.file, spec.type)
    shown = spec.few_shot or 0
    pool: list[Item] | None = None
    if spec.few_shot_file is not None:
        pool, more = read_items(spec.few_shot_file, spec.type)
        mistakes += more
        if not more and len(pool) < shown:
            mistakes.append(f"{spec.few_shot_file}: few_shot asks for {shown} examples, the file has {len(pool)}")
        asked_too = sorted({item.context for item in pool[:shown]} & {item.context for item in items})
        mistakes += [f"{spec.few_shot_file}: an example is also asked: {text[-60:]!r}" for text in asked_too]
    if mistakes:
        return Drawn((), (), 0), mistakes
    drawn = order(len(items), seed)
    examples = pool[:shown] if pool is not None else [items[position] for position in drawn[:shown]]
    rest = drawn if pool is not None else drawn[shown:]
    for name, limit in (("items", spec.items or 1), ("max_items", spec.max_items or 1)):
        if limit > len(rest):
            left = f" beside {shown} shown as examples" if pool is None and shown else ""
            mistakes.append(f"{spec.file}: {name} is {limit}, the file has {max(0, len(rest))}{left}")
    asked, ranks = in_file_order(rest[: spec.most])
    return Drawn(tuple(items[position] for position in asked), tuple(examples), len(rest), ranks), mistakes


def in_file_order(drawn: list[int]) -> tuple[list[int], tuple[int, ...]]:
    """Positions sorted, and for each the rank at which it was drawn."""
    ranks = {position: rank for rank, position in enumerate(drawn)}
    ordered = sorted(drawn)
    return ordered, tuple(ranks[position] for position in ordered)
