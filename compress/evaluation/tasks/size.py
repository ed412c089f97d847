"""How much reading a task is, guessed from its characters before any tokenizer is there."""

from __future__ import annotations

from dataclasses import dataclass

from compress.evaluation.latency.spec import Latency
from compress.evaluation.prompts.spec import Prompts, read_prompts
from compress.evaluation.tasks.items import draw
from compress.evaluation.tasks.spec import Task

CHARACTERS_PER_TOKEN = 4
"""English in a common vocabulary; the guess is within a factor of two for other languages."""
PREDICTED = 3
"""Tokens of a choice or an answer whose logits are formed."""


@dataclass(frozen=True)
class Size:
    """Tokens that one model reads and writes, and positions whose logits are formed."""

    tokens: int = 0
    positions: int = 0
    writes: int = 0

    def __add__(self, other: Size) -> Size:
        return Size(self.tokens + other.tokens, self.positions + other.positions, self.writes + other.writes)


def size_of_prompts(spec: Prompts | None) -> Size:
    """The size of a recipe's prompts."""
    if spec is None:
        return Size()
    prompts, _ = read_prompts(spec)
    written = len(prompts) * spec.max_new_tokens
    return Size(sum(len(prompt.text) for prompt in prompts) // CHARACTERS_PER_TOKEN, written, written)


def size_of_latency(spec: Latency | None) -> Size:
    """The size of taking turns."""
    if spec is None:
        return Size()
    turns = (spec.repeats + 1) * spec.batch
    return Size(turns * spec.prompt_tokens, turns * spec.new_tokens, turns * spec.new_tokens)


def size_of(spec: Task, seed: int) -> Size | None:
    """The size of a local task at the first look; None for one of lm-eval's own, whose items are not known yet."""
    if spec.file is None:
        return None
    drawn, _ = draw(spec, seed)
    asked = [
        item for item, rank in zip(drawn.asked, drawn.ranks, strict=True) if spec.items is None or rank < spec.items
    ]
    shown = sum(len(item.context) + len(str(item.answer)) for item in drawn.examples)
    answers = sum(len(item.choices) or 1 for item in asked)
    tokens = (sum(item.characters for item in asked) + answers * shown) // CHARACTERS_PER_TOKEN
    if spec.type == "generation":
        written = len(asked) * spec.max_new_tokens
        return Size(tokens, written, written)
    return Size(tokens, answers * PREDICTED)
