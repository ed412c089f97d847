"""What one model answered, item by item, as plain values that are kept as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from compress.evaluation.tasks.question import score_of
from compress.files import write_text


class Answer(BaseModel):
    """One model's answer to one item."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")
    id: str
    correct: bool
    correct_norm: bool | None = Field(default=None, description="with log-likelihoods divided by length; choices only")
    loglikelihoods: tuple[float, ...] | None = Field(default=None, description="nats, of each choice or of the answer")
    greedy: bool | None = Field(default=None, description="cloze: greedy decoding would have written the answer")
    text: str | None = Field(default=None, description="what was generated")


class Asked(BaseModel):
    """One item as it was put: the same for both models."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    id: str
    context: str = Field(description="the whole prompt, examples and chat template included")
    choices: tuple[str, ...] = ()
    answer: str
    answer_index: int | None = None


class Answers(BaseModel):
    """One model's answers to a task, in the order asked, and what was asked."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    asked: tuple[Asked, ...]
    answers: tuple[Answer, ...]


def joined(first: Answers, more: Answers) -> Answers:
    """Answers to two parts of a task as one."""
    return Answers(asked=(*first.asked, *more.asked), answers=(*first.answers, *more.answers))


def from_records(question: Any, ids: Sequence[str], records: Sequence[dict[str, Any]]) -> Answers:
    """lm-eval's records of a task, one an item in the order of `ids`, as answers."""
    kind, score = str(question.get_config("output_type")), score_of(question)
    assert score is not None
    asked = tuple(_asked(question, kind, identity, record) for identity, record in zip(ids, records, strict=True))
    answers = tuple(_answer(kind, score, identity, record) for identity, record in zip(ids, records, strict=True))
    return Answers(asked=asked, answers=answers)


def _asked(question: Any, kind: str, identity: str, record: dict[str, Any]) -> Asked:
    context, target = str(record["arguments"][0][0]), record["target"]
    if kind != "multiple_choice":
        return Asked(id=identity, context=context, answer=str(target))
    choices = tuple(str(choice) for choice in question.doc_to_choice(record["doc"]))
    index = choices.index(target) if isinstance(target, str) and target in choices else target
    if not isinstance(index, int):
        return Asked(id=identity, context=context, choices=choices, answer=str(target))
    return Asked(id=identity, context=context, choices=choices, answer=choices[index], answer_index=index)


def _answer(kind: str, score: str, identity: str, record: dict[str, Any]) -> Answer:
    """A broken model's NaN is a wrong answer: of NaNs alone, the first choice would count as the likeliest."""
    correct = bool(record[score])
    if kind == "generate_until":
        return Answer(id=identity, correct=correct, text=_text(record["resps"]))
    replies = [reply[0] for reply in record["resps"]]
    likelihoods = tuple(float(reply[0]) for reply in replies)
    if not all(math.isfinite(value) for value in likelihoods):
        return Answer(id=identity, correct=False, correct_norm=False, loglikelihoods=likelihoods, greedy=False)
    if kind == "loglikelihood":
        return Answer(id=identity, correct=correct, loglikelihoods=likelihoods, greedy=bool(replies[0][1]))
    norm = bool(record["acc_norm"]) if "acc_norm" in record else None
    return Answer(id=identity, correct=correct, correct_norm=norm, loglikelihoods=likelihoods)


def _text(replies: Any) -> str:
    """The text of a generated reply: lm-eval nests it by request and repeat."""
    while isinstance(replies, (list, tuple)):
        replies = replies[0]
    return str(replies)


def save(path: Path, answers: Answers) -> None:
    """Keep the source's answers for the next run that asks the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, answers.model_dump_json() + "\n")


def load(path: Path) -> Answers | None:
    """Kept answers, or None if they are not there or not whole."""
    try:
        return Answers.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, ValidationError):
        return None
