"""The story of a run on one screen: check, measure, compress, export, reload, measure, judge, publish.

    recipe -> plan -> source -> texts -> baseline -> stage 1 -> stage 2 -> ... -> export -> evidence -> gates -> report

Each step is a call into the file of that name under `steps/`. Data goes forward only. `evaluate` is the same story
without the stages, about a model that is there already.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from compress.artifacts import manifest
from compress.artifacts.manifest import hashed_model
from compress.artifacts.store import Store, check_writable
from compress.checkpoints.export import export
from compress.checkpoints.sources import cache_folder
from compress.errors import ExitCode
from compress.evaluation.tasks.compare import write_items
from compress.events import Event, Progress
from compress.files import A_CACHE, disk_errors
from compress.memory.measure import PeakSampler, large_tensors_from_system, settled
from compress.recipe import Recipe
from compress.reports.card import model_card
from compress.reports.report import ArtifactRef, Report
from compress.reports.write import write_report
from compress.steps import reporting
from compress.steps.candidate import Asked, calibration_events, check_comparable, exported, open_candidate
from compress.steps.deciding import Inquiry, decide
from compress.steps.environment import versions
from compress.steps.judging import measure_candidate, measure_source, round_trip, with_noise
from compress.steps.latency import time_both
from compress.steps.made import compress, from_parent
from compress.steps.parent import Parent
from compress.steps.plan import Plan, make_plan, plan_evaluation
from compress.steps.previous import against_previous
from compress.steps.prompts import ask_candidate_prompts, ask_source_prompts
from compress.steps.quantised_alone import quantised_alone
from compress.steps.source import open_source
from compress.steps.tasks import ask_candidate, ask_source, read_tasks
from compress.steps.texts import read_texts

EXIT_CODES = {
    "passed": ExitCode.PASSED,
    "failed": ExitCode.GATE_FAILED,
    "inconclusive": ExitCode.GATE_INCONCLUSIVE,
}


@dataclass(frozen=True)
class Outcome:
    """Where the artifact, the rejected run or the judged model is; the report, and its HTML face if it was written."""

    folder: Path
    report: Report
    html: Path | None

    @property
    def exit_code(self) -> ExitCode:
        return EXIT_CODES[self.report.verdict]


def plan(recipe: Recipe, store: Path, progress: Progress) -> Plan:
    """Check and predict. The only thing computed, if at all, is the conversion of a .gguf source, which is kept."""
    return make_plan(recipe, store, progress)


def run(planned: Plan, store_folder: Path, progress: Progress, parent: Parent | None = None) -> Outcome:
    """Take a plan to a published artifact, or to a kept and marked rejected run. Raises CompressError otherwise.

    With a `parent` nothing is compressed: its integers are written in the format of the recipe, judged and published.
    """
    large_tensors_from_system()
    started, clock = datetime.now(UTC), _Clock()
    recipe, store = planned.recipe, Store(store_folder)
    with settled(), PeakSampler() as sampler, disk_errors(cache_folder(), A_CACHE):
        check_writable(store_folder, planned.stored_bytes)
        with clock.step("source"), sampler.phase("source"):
            source = open_source(recipe.model, progress)
            # What was sampled beside the parent's text is not sampled again: overlap is looked for in the text.
            texts = read_texts(recipe if parent is None else recipe.of_text, source, planned.machine, progress)
            tasks = read_tasks(planned, source, texts, progress)
        with clock.step("baseline"), sampler.phase("baseline"):
            baseline = measure_source(recipe, source, texts, planned.machine, progress)
            baseline = with_noise(baseline, source, texts, planned.machine, progress)
            answers = ask_source(planned, source, tasks, progress)
            talk = ask_source_prompts(planned, source, progress)
        with clock.step("stages"):
            made = from_parent(parent) if parent else compress(planned, source, texts, progress, sampler)
        with store.staging(recipe.name) as staged:
            with clock.step("export"), sampler.phase("export"):
                (staged / "recipe.yaml").write_text(recipe.dump(), encoding="utf-8")
                written = export(
                    made.checkpoint,
                    staged / "model",
                    recipe.export.format,
                    planned.stored,
                    recipe.export.max_shard_bytes,
                )
            with clock.step("evaluation"), sampler.phase("evaluation"):
                candidate = exported(staged / "model", written.bytes, progress)
                evidence, states = measure_candidate(planned, candidate, source, baseline, texts, progress)
                evidence = ask_candidate(planned, candidate, tasks, answers, evidence, progress)
                talk = ask_candidate_prompts(planned, candidate, talk, progress)
            with clock.step("round trip"), sampler.phase("round trip"):
                evidence = round_trip(planned, candidate, texts, evidence, states, progress)
                evidence = time_both(planned, source, candidate, evidence, progress)
            alone = None
            if parent is None and any(stage.compares for stage in recipe.stages):
                with clock.step("quantised alone"):
                    alone = quantised_alone(planned, source, baseline, texts, evidence, sampler, progress)
            events: list[Event] = [*source.events, *texts.events, *baseline.events, *answers.events]
            events += [*made.events, *written.events]
            events += [*evidence.events, *(talk.events if talk else ())]
            inquiry = Inquiry(planned, source, candidate, texts, tasks, source.checkpoint.weight_bytes, progress)
            with clock.step("verdict"), sampler.phase("verdict"):
                decision = decide(inquiry, evidence, events)
            digest, hashed = hashed_model(staged)
            with sampler.phase("publish"), store.reserve(recipe.name, rejected=decision.verdict != "passed") as slot:
                artifact = ArtifactRef(path=str(slot.path), name=recipe.name, version=slot.label, digest=digest)
                report = reporting.assemble(
                    planned,
                    source,
                    texts,
                    made.stages,
                    decision,
                    talk,
                    sampler,
                    clock.seconds,
                    started,
                    artifact,
                    alone=alone,
                    parent=parent,
                    made=made.checkpoint,
                )
                report = against_previous(report, store)
                (staged / "model" / "README.md").write_text(model_card(report), encoding="utf-8")
                write_report(report, staged / "reports")
                write_items(decision.evidence.tasks, staged / "reports" / "items")
                folder = slot.publish(staged, decision.verdict, _facts(report, parent), hashed)
        if parent:
            detail = f"from {parent.reference} as {recipe.export.format}"
            store.record(recipe.name, "exported", artifact.version, manifest.read(folder).digest, detail)
    return Outcome(folder, report, folder / "reports" / "report.html")


def evaluate(recipe: Recipe, asked: Asked, out: Path | None, progress: Progress) -> Outcome:
    """Judge a model that is there already by a recipe's gates; nothing is compressed or published.

    The report goes to `out`, a new or empty folder, if one is given. Raises CompressError.
    """
    large_tensors_from_system()
    started, clock = datetime.now(UTC), _Clock()
    with settled(), PeakSampler() as sampler, disk_errors(cache_folder(), A_CACHE):
        planned = plan_evaluation(recipe, asked.model.spec, progress)
        with clock.step("source"), sampler.phase("source"):
            source = open_source(recipe.model, progress)
            reference = open_source(asked.against.spec, progress, as_it_is=True) if asked.against else source
            candidate = open_candidate(asked.model, reference.tokenizer, progress)
            texts = read_texts(candidate.calibrated(recipe), reference, planned.machine, progress)
            check_comparable(recipe, candidate, reference, texts)
            tasks = read_tasks(planned, reference, texts, progress)
        with clock.step("baseline"), sampler.phase("baseline"):
            baseline = measure_source(recipe, reference, texts, planned.machine, progress)
            baseline = with_noise(baseline, reference, texts, planned.machine, progress)
            answers = ask_source(planned, reference, tasks, progress)
            talk = ask_source_prompts(planned, reference, progress)
        with clock.step("evaluation"), sampler.phase("evaluation"):
            evidence, states = measure_candidate(planned, candidate, reference, baseline, texts, progress)
            evidence = ask_candidate(planned, candidate, tasks, answers, evidence, progress)
            talk = ask_candidate_prompts(planned, candidate, talk, progress)
        with clock.step("round trip"), sampler.phase("round trip"):
            evidence = round_trip(planned, candidate, texts, evidence, states, progress)
            evidence = time_both(planned, reference, candidate, evidence, progress)
        events = [
            *reference.events,
            *candidate.events,
            *calibration_events(candidate, texts),
            *texts.events,
            *baseline.events,
            *answers.events,
        ]
        events += [*evidence.events, *(talk.events if talk else ())]
        inquiry = Inquiry(planned, reference, candidate, texts, tasks, source.checkpoint.weight_bytes, progress)
        with clock.step("verdict"), sampler.phase("verdict"):
            decision = decide(inquiry, evidence, events)
        report = reporting.assemble(
            planned,
            source,
            texts,
            [],
            decision,
            talk,
            sampler,
            clock.seconds,
            started,
            candidate.artifact,
            reporting.judged(planned, asked, candidate, reference),
        )
    if out is not None:
        write_report(report, out)
        write_items(decision.evidence.tasks, out / "items")
    return Outcome(candidate.folder, report, out / "report.html" if out else None)


def _facts(report: Report, parent: Parent | None) -> dict[str, Any]:
    """What the manifest repeats of the report: digests of what went in, and the environment."""
    lineage = {
        "source": report.provenance["source"]["digest"],
        "recipe": report.provenance["recipe_digest"],
    }
    if report.calibration.get("digest"):
        lineage["calibration"] = report.calibration["digest"]
    facts: dict[str, Any] = {"lineage": lineage, "environment": {**report.provenance["machine"], **versions()}}
    if parent:
        lineage["parent"] = parent.digest
        facts["parent"] = {"reference": parent.reference, "digest": parent.digest}
    return facts


class _Clock:
    """Seconds by step, in order."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started
