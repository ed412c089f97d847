"""From evidence to a verdict, with more evidence where a gate cannot decide and the recipe allows it.

A gate that comes out inconclusive asks for its set's or task's next look; both models are measured on what is new
there, and everything is judged again. How many looks there can be was fixed before the first, and each uses its share
of alpha (`evaluation.looks`). A gate that already failed ends it: more evidence could not pass the model.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from compress.evaluation.looks import look_sizes
from compress.evaluation.measure import TokenScores, summarise
from compress.evaluation.tasks.compare import measure
from compress.events import Event, Progress
from compress.gates import Judgement
from compress.gates.base import Look, Verdict
from compress.steps.candidate import Candidate
from compress.steps.judging import Evidence, judge, measure_source, scores_of
from compress.steps.plan import Plan
from compress.steps.source import OpenedSource
from compress.steps.tasks import Tasks, ask_candidate, ask_source
from compress.steps.texts import Texts


@dataclass(frozen=True)
class Inquiry:
    """Everything needed to ask for more: both models, and what may be read and asked."""

    plan: Plan
    reference: OpenedSource
    candidate: Candidate
    texts: Texts
    tasks: Tasks
    source_bytes: int
    """Of the recipe's source, whatever `reference` is."""
    progress: Progress


@dataclass(frozen=True)
class Decision:
    """The verdict, and the evidence it was reached on."""

    verdict: Verdict
    judgements: list[Judgement]
    evidence: Evidence
    events: list[Event]
    looks: dict[str, Look] = field(default_factory=dict)
    """By set or task that could grow: which look was the last, and the units of all that there could have been."""


def decide(inquiry: Inquiry, evidence: Evidence, events: list[Event]) -> Decision:
    """Judge, and ask for more as long as that could turn an inconclusive verdict."""
    looks = _first_looks(inquiry)
    while True:
        counts = inquiry.candidate.counts(events)
        by_measure = {measure: looks[of] for measure, of in _owners(inquiry.plan, looks).items()}
        verdict, judgements = judge(
            inquiry.plan.recipe, evidence, counts, inquiry.source_bytes, inquiry.candidate, by_measure
        )
        wanted = _wanted(verdict, judgements, _owners(inquiry.plan, looks), looks)
        if not wanted:
            return Decision(verdict, judgements, evidence, events, looks)
        evidence, more = _look_again(inquiry, evidence, {name: looks[name].number for name in wanted})
        events = [*events, *more]
        looks = looks | {name: replace(looks[name], number=looks[name].number + 1) for name in wanted}


def _first_looks(inquiry: Inquiry) -> dict[str, Look]:
    """Sets and tasks that can grow, at their first look."""
    looks = {}
    for name, more in inquiry.texts.more.items():
        first = len(inquiry.texts.evaluation[name].ids)
        looks[name] = Look(1, look_sizes(first, first + sum(len(piece.ids) for pieces in more for piece in pieces)))
    for task in inquiry.tasks.prepared:
        further = sum(len(part.ids) for part in inquiry.tasks.more.get(task.name, ()))
        looks[task.name] = Look(1, look_sizes(len(task.ids), len(task.ids) + further))
    return {name: look for name, look in looks.items() if len(look.sizes) > 1}


def _owners(plan: Plan, looks: dict[str, Look]) -> dict[str, str]:
    """The set or task that a measure is taken on, where that can grow."""
    specs = [(spec.set_name, spec.measures) for spec in plan.recipe.on_text]
    specs += [(task.label, task.measures) for task in plan.recipe.tasks]
    return {name: owner for owner, measures in specs for name in measures if owner in looks}


def _wanted(verdict: Verdict, judgements: list[Judgement], owners: dict[str, str], looks: dict[str, Look]) -> list[str]:
    """Sets and tasks on which a critical gate could not decide, and which have more."""
    if verdict != "inconclusive":
        return []
    undecided = [each for each in judgements if each.tier == "critical" and each.verdict == "inconclusive"]
    names = {owners[each.measure] for each in undecided if each.alpha is not None and each.measure in owners}
    return [name for name in looks if name in names and not looks[name].is_last]


def _look_again(inquiry: Inquiry, evidence: Evidence, numbers: dict[str, int]) -> tuple[Evidence, list[Event]]:
    """The evidence with the next look at some sets and tasks. numbers: by name, how many looks there were."""
    plan, candidate, progress = inquiry.plan, inquiry.candidate, inquiry.progress
    events: list[Event] = []
    scores = dict(evidence.scores)
    for name in (name for name in numbers if name in inquiry.texts.more):
        for windows in inquiry.texts.more[name][numbers[name] - 1]:
            part = replace(inquiry.texts, evaluation={name: windows})
            baseline = measure_source(plan.recipe, inquiry.reference, part, plan.machine, progress)
            events += baseline.events
            found, _ = scores_of(plan, candidate, inquiry.reference, baseline, part, progress)
            scores[name] = _joined(scores[name], found[name])
    before, after = summarise(plan.recipe.on_text, scores)
    before, after = before.over(evidence.source), after.over(evidence.compressed)
    comparisons = list(evidence.tasks)
    for at, comparison in enumerate(comparisons):
        name = comparison.prepared.name
        if name in numbers:
            part_tasks = replace(inquiry.tasks, prepared=(inquiry.tasks.more[name][numbers[name] - 1],))
            answers = ask_source(plan, inquiry.reference, part_tasks, progress)
            events += answers.events
            asked = ask_candidate(plan, candidate, part_tasks, answers, evidence, progress).tasks
            comparisons[at] = comparison.joined(asked[0])
    for comparison in comparisons:
        measure(comparison, before, after)
    return replace(evidence, source=before, compressed=after, scores=scores, tasks=tuple(comparisons)), events


def _joined(first: TokenScores, more: TokenScores) -> TokenScores:
    """Scores on the windows of both."""
    names = TokenScores.__dataclass_fields__
    return TokenScores(**{name: torch.cat([getattr(first, name), getattr(more, name)]) for name in names})
