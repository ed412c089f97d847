"""Tasks of a run: prompts checked before work, the source asked once, the export asked the same, both compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from compress.calibration.overlap import LIMIT, NGRAM, shared_fraction_of_questions
from compress.calibration.windows import Windows
from compress.checkpoints.reader import Checkpoint
from compress.checkpoints.sources import cache_folder
from compress.errors import RecipeError, UnhealthySourceError
from compress.evaluation.tasks import harness
from compress.evaluation.tasks.compare import Comparison, measure
from compress.evaluation.tasks.generate import Generation, write_texts
from compress.evaluation.tasks.likelihood import Scored, score_requests
from compress.evaluation.tasks.prepare import Prepared, by_look, check_template, prepare, tokens_asked
from compress.evaluation.tasks.results import Answers, from_records, load, save
from compress.events import Event, Progress
from compress.files import digest_of_json
from compress.steps.candidate import Candidate
from compress.steps.environment import Machine, code_digest, fits, versions
from compress.steps.judging import Evidence
from compress.steps.plan import Plan
from compress.steps.source import OpenedSource, load_tokenizer
from compress.steps.texts import Texts


@dataclass(frozen=True)
class Tasks:
    """The tasks of a run, and each one's share of n-grams found in the calibration windows."""

    prepared: tuple[Prepared, ...] = ()
    overlap: dict[str, float] | None = None
    more: dict[str, tuple[Prepared, ...]] = field(default_factory=dict)
    """By task, what each further look adds."""


@dataclass(frozen=True)
class SourceAnswers:
    """The source's answers by task; a task that could not be asked is missing, and an event says why."""

    answers: dict[str, Answers]
    events: tuple[Event, ...] = ()


@dataclass(frozen=True)
class Model:
    """A model folder that answers: log-likelihoods by the block walk, text through the public loader."""

    folder: Path
    checkpoint: Checkpoint
    tokenizer: Any
    machine: Machine
    progress: Progress
    label: str

    def score(self, requests: list[tuple[list[int], list[int]]]) -> list[Scored]:
        machine = self.machine
        return score_requests(
            self.checkpoint,
            requests,
            machine.device,
            machine.compute,
            machine.tokens_at_once,
            self.progress,
            self.label,
        )

    def write(self, requests: list[Generation]) -> list[str]:
        machine = self.machine
        return write_texts(
            self.folder,
            self.tokenizer,
            requests,
            machine.device,
            machine.compute,
            machine.tokens_at_once,
            self.progress,
            self.label,
        )


def read_tasks(plan: Plan, source: OpenedSource, texts: Texts, progress: Progress) -> Tasks:
    """Build and check every prompt. Raises RecipeError with the mistakes of all tasks, or for questions that were
    calibrated on, and EnvironmentLacksError where lm-eval or a hub's data are missing."""
    if not plan.recipe.tasks:
        return Tasks()
    harness.require()
    prepared, mistakes = [], []
    with progress.task("tasks", len(plan.recipe.tasks)) as advance:
        for spec in plan.recipe.tasks:
            try:
                prepared.append(prepare(spec, source.tokenizer, plan.dimensions.max_context, plan.recipe.seed))
            except RecipeError as error:
                mistakes += error.mistakes
            advance(spec.label)
    if mistakes:
        raise RecipeError(mistakes)
    overlap = _overlap(texts.calibration, prepared, source.tokenizer)
    looks = {task.name: by_look(task, source.tokenizer, plan.recipe.seed) for task in prepared}
    return Tasks(
        tuple(first for first, _ in looks.values()), overlap, {name: more for name, (_, more) in looks.items()}
    )


def _overlap(calibration: Windows | None, prepared: Sequence[Prepared], tokenizer: Any) -> dict[str, float]:
    """By task. Raises RecipeError above the limit."""
    if calibration is None:
        return {task.name: 0.0 for task in prepared}
    shared = {}
    for task in prepared:
        questions = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in task.contexts]
        shared[task.name] = shared_fraction_of_questions(calibration.ids, questions)
    guilty = [f"{name} ({share:.0%})" for name, share in shared.items() if share > LIMIT]
    if guilty:
        raise RecipeError(
            f"tasks overlap calibration text: {', '.join(guilty)} of their {NGRAM}-token runs occur in the calibration "
            f"windows, {LIMIT:.0%} are allowed. A model must be judged on questions it was not calibrated on: use "
            "another task or another calibration text."
        )
    return shared


def ask_source(plan: Plan, source: OpenedSource, tasks: Tasks, progress: Progress) -> SourceAnswers:
    """The source's answers, those of an earlier run where it asked the same. Raises UnhealthySourceError for a task on
    which the source does not reach the recipe's floor."""
    model = Model(
        source.source.folder, source.checkpoint, source.tokenizer, plan.machine, progress, "the source's answers"
    )
    found: dict[str, Answers] = {}
    events: list[Event] = []
    for task in tasks.prepared:
        if task.generates and not fits(plan.parameters, plan.reload_bytes, plan.machine):
            message = "text is generated by the whole model, which does not fit in memory at once; nothing was asked"
            events.append(Event("task_skipped", task.name, message))
            continue
        path = _kept(source, task, plan)
        kept = load(path)
        if kept is not None:
            events.append(Event("baseline_reused", task.name, "the source's answers came from the cache"))
        answers = kept or ask(task, model, plan.recipe.seed)
        if kept is None:
            save(path, answers)
        found[task.name] = answers
    _check_floors(tasks, found)
    return SourceAnswers(found, tuple(events))


def ask(task: Prepared, model: Model, seed: int) -> Answers:
    """One model's answers to one task."""
    from compress.evaluation.tasks.language_model import AnsweringLM

    lm = AnsweringLM(model.tokenizer, model)
    records = harness.ask(task.question, lm, task.positions, task.spec.chat_template, seed)
    return from_records(task.question, task.ids, records)


def _kept(source: OpenedSource, task: Prepared, plan: Plan) -> Path:
    """Where the source's answers are kept: by everything that decides them."""
    key = digest_of_json(
        {
            "source": source.digest,
            "asked": task.digest,
            "ids": task.ids,
            "machine": plan.machine.to_json(),
            "code": code_digest(),
            "versions": {**versions(), "lm_eval": harness.version()},
        }
    )
    return cache_folder() / "baselines" / f"{key}.json"


def _check_floors(tasks: Tasks, answers: dict[str, Answers]) -> None:
    low = []
    for task in tasks.prepared:
        if task.spec.floor is None or task.name not in answers:
            continue
        given = answers[task.name].answers
        accuracy = sum(answer.correct for answer in given) / len(given)
        if accuracy < task.spec.floor:
            low.append(f"{accuracy:.1%} on {task.name}, its floor is {task.spec.floor:.1%}")
    if low:
        raise UnhealthySourceError(
            f"the source model answers too little right: {'; '.join(low)}. It is broken, or the task is not for it; "
            "nothing was compressed."
        )


def check_same_prompts(label: str, tokenizer: Any, tasks: Tasks, seed: int) -> None:
    """Raises RecipeError where a tokenizer lacks a chat template that a task wants, or would ask anything else than the
    source is asked."""
    mistakes = []
    for task in tasks.prepared:
        check_template(task.spec, tokenizer)
        if tokens_asked(task, tokenizer, seed) != task.digest:
            mistakes.append(
                f"task {task.name}: the tokenizer or chat template of {label} gives other prompts than the source's, "
                "so the two cannot be compared"
            )
    if mistakes:
        raise RecipeError(mistakes)


def ask_candidate(
    plan: Plan, candidate: Candidate, tasks: Tasks, source: SourceAnswers, evidence: Evidence, progress: Progress
) -> Evidence:
    """The evidence with the judged model's answers, read from disk and with its own tokenizer.

    Raises RecipeError if that tokenizer would ask anything else than the source was asked.
    """
    if not tasks.prepared:
        return evidence
    folder, label = candidate.loadable, f"the {candidate.noun}'s answers"
    tokenizer = candidate.tokenizer or load_tokenizer(folder)
    check_same_prompts(str(folder), tokenizer, tasks, plan.recipe.seed)
    model = Model(folder, candidate.checkpoint, tokenizer, plan.machine, progress, label)
    comparisons = []
    for task in tasks.prepared:
        if task.name not in source.answers:
            continue
        answers = ask(task, model, plan.recipe.seed)
        overlap = (tasks.overlap or {})[task.name]
        comparisons.append(Comparison(task, source.answers[task.name], answers, overlap))
    for comparison in comparisons:
        measure(comparison, evidence.source, evidence.compressed)
    return replace(evidence, tasks=tuple(comparisons))
