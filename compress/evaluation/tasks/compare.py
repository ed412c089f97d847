"""Both models' answers to one task: measurements with intervals, pairs for gates, flips with examples."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats

from compress.evaluation.measure import Measured
from compress.evaluation.paired import Paired
from compress.evaluation.statistics import Interval, mean_interval
from compress.evaluation.tasks.prepare import Prepared
from compress.evaluation.tasks.results import Answer, Answers, Asked, joined
from compress.files import digest_of_json

EXAMPLES = 5
"""Flips of each direction that a report shows."""
TAIL = 300
"""Characters of a context's end that are shown."""


@dataclass(frozen=True)
class Comparison:
    """What both models answered to one task."""

    prepared: Prepared
    source: Answers
    compressed: Answers
    overlap: float
    """Share of the contexts' n-grams found in the calibration windows."""

    def joined(self, more: Comparison) -> Comparison:
        """This one and another part of the same task."""
        prepared = replace(
            self.prepared,
            ids=(*self.prepared.ids, *more.prepared.ids),
            digest=digest_of_json([self.prepared.digest, more.prepared.digest]),
        )
        return Comparison(
            prepared, joined(self.source, more.source), joined(self.compressed, more.compressed), self.overlap
        )

    def flips(self, lost: bool) -> list[int]:
        """Items that only the source got right (`lost`), or only the compressed model."""
        pairs = zip(self.source.answers, self.compressed.answers, strict=True)
        return [at for at, (a, b) in enumerate(pairs) if a.correct != b.correct and a.correct == lost]


def wilson(right: int, count: int, confidence: float = 0.95) -> Interval:
    """Wilson's interval of a proportion: it holds near 0 and 1, and never leaves them."""
    found = stats.binomtest(right, count).proportion_ci(confidence, method="wilson")
    return float(found.low), float(found.high)


def measure(comparison: Comparison, source: Measured, compressed: Measured) -> None:
    """Put a task's measurements, intervals and pairs into both sides."""
    name = f"task.{comparison.prepared.name}"
    _right(f"{name}.accuracy", lambda answer: answer.correct, comparison, source, compressed)
    if comparison.prepared.spec.normalise:
        _right(f"{name}.accuracy_norm", lambda answer: bool(answer.correct_norm), comparison, source, compressed)
    if f"{name}.nll" in comparison.prepared.spec.measures:
        _nll(f"{name}.nll", comparison, source, compressed)


def _right(
    name: str, right: Callable[[Answer], bool], comparison: Comparison, source: Measured, compressed: Measured
) -> None:
    scores = [_scores(answers, right) for answers in (comparison.source, comparison.compressed)]
    for measured, score in zip((source, compressed), scores, strict=True):
        measured.values[name] = float(score.mean())
        measured.intervals[name] = wilson(int(score.sum()), len(score))
    compressed.paired[name] = _paired(comparison, scores)


def _nll(name: str, comparison: Comparison, source: Measured, compressed: Measured) -> None:
    losses = [_scores(answers, _loss) for answers in (comparison.source, comparison.compressed)]
    for measured, loss in zip((source, compressed), losses, strict=True):
        mean, interval = mean_interval(torch.from_numpy(loss), torch.ones(len(loss)))
        measured.values[name], measured.intervals[name] = mean, interval
    compressed.paired[name] = _paired(comparison, losses)


def _loss(answer: Answer) -> float:
    assert answer.loglikelihoods is not None
    return -answer.loglikelihoods[0]


def _scores(answers: Answers, of: Callable[[Answer], float]) -> NDArray[np.float64]:
    return np.array([of(answer) for answer in answers.answers], dtype=np.float64)


def _paired(comparison: Comparison, scores: list[NDArray[np.float64]]) -> Paired:
    return Paired("items", comparison.prepared.ids, scores[0], scores[1], np.ones(len(scores[0])))


def item_lines(comparison: Comparison) -> str:
    """One JSON line per item: what was asked and what both models answered."""
    rows = zip(comparison.source.asked, comparison.source.answers, comparison.compressed.answers, strict=True)
    return "".join(json.dumps(_line(*row), ensure_ascii=False) + "\n" for row in rows)


def _line(asked: Asked, source: Answer, compressed: Answer) -> dict[str, Any]:
    line: dict[str, Any] = {
        "id": asked.id,
        "flip": source.correct != compressed.correct,
        "answer": asked.answer if asked.answer_index is None else asked.answer_index,
    }
    for side, answer in (("source", source), ("compressed", compressed)):
        # As pydantic writes it: numbers that JSON does not know become texts.
        line[side] = json.loads(answer.model_dump_json(exclude={"id"}, exclude_none=True))
    return line


def write_items(comparisons: Sequence[Comparison], folder: Path) -> None:
    """`folder/<task>.jsonl` for every task."""
    if comparisons:
        folder.mkdir(parents=True, exist_ok=True)
    for comparison in comparisons:
        path = folder / f"{comparison.prepared.name}.jsonl"
        path.write_text(item_lines(comparison), encoding="utf-8", newline="\n")


def examples(comparison: Comparison, lost: bool) -> list[dict[str, Any]]:
    """The first flips of one direction, for people to read."""
    shown = []
    for at in comparison.flips(lost)[:EXAMPLES]:
        asked = comparison.source.asked[at]
        shown.append(
            {
                "id": asked.id,
                "context_tail": asked.context[-TAIL:],
                "cut": len(asked.context) > TAIL,
                "choices": list(asked.choices),
                "answer": asked.answer,
                "source": said(asked, comparison.source.answers[at]),
                "compressed": said(asked, comparison.compressed.answers[at]),
            }
        )
    return shown


def said(asked: Asked, answer: Answer) -> str:
    """What a model chose or wrote, in words."""
    if answer.text is not None:
        return answer.text
    likelihoods = answer.loglikelihoods or ()
    if not asked.choices:
        return f"{'wrote the answer' if answer.greedy else 'wrote something else'} ({likelihoods[0]:.2f} nats)"
    best = int(np.argmax(likelihoods[: len(asked.choices)]))
    return f"{asked.choices[best]} ({likelihoods[best]:.2f} nats)"
