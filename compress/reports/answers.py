"""Answers to prompts side by side: words and marked pieces, shared by Markdown and HTML."""

from __future__ import annotations

from dataclasses import dataclass

from compress.evaluation.prompts.differences import Piece, differences
from compress.reports.report import AnswersRecord

UNCHANGED = "word for word the same"


@dataclass(frozen=True)
class Side:
    """One model's answer. `pieces` joined are the whole text."""

    title: str
    pieces: list[Piece]


@dataclass(frozen=True)
class Shown:
    """One prompt with both answers."""

    id: str
    prompt: str
    same: bool
    sides: tuple[Side, Side]


def shown(answers: AnswersRecord) -> list[Shown]:
    """Every prompt, in the order asked."""
    found = []
    for pair in answers.pairs:
        first, second = differences(pair.source, pair.compressed)
        sides = Side("Source", first), Side("Compressed", second)
        found.append(Shown(pair.id, pair.prompt, pair.source == pair.compressed, sides))
    return found


def introduction(answers: AnswersRecord) -> str:
    """How to read them."""
    same = sum(pair.source == pair.compressed for pair in answers.pairs)
    template = "through the chat template" if answers.chat_template else "without a chat template"
    return (
        f"{same} of {len(answers.pairs)} answers are {UNCHANGED}. Both models wrote the likeliest token each time, at "
        f"most {answers.max_new_tokens} of them, {template}. One early token decides all that follow, so a small "
        "change can look large here; whether an answer is worse is for the reader. No gate looks at these answers."
    )
