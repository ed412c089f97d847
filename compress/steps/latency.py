"""Time of both models, if the recipe asks for it and both fit in memory at once."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path

from compress.evaluation.latency.turns import measure, take_turns
from compress.evaluation.tasks.generate import load_model
from compress.events import Event, Progress
from compress.steps.candidate import Candidate
from compress.steps.environment import fits
from compress.steps.judging import Evidence
from compress.steps.plan import Plan
from compress.steps.source import OpenedSource


def time_both(
    plan: Plan, reference: OpenedSource, candidate: Candidate, evidence: Evidence, progress: Progress
) -> Evidence:
    """The evidence with the seconds of both models, or with the event that they were not measured."""
    spec = plan.recipe.latency
    if spec is None:
        return evidence
    if candidate.files is None:
        message = "a .gguf file is served by another runtime than the one that could be timed here"
        return replace(evidence, events=(*evidence.events, Event("latency_skipped", "latency", message)))
    if not fits(2 * plan.parameters, 2 * plan.reload_bytes, plan.machine):
        message = "both models do not fit in memory at once, so their times were not compared"
        return replace(evidence, events=(*evidence.events, Event("latency_skipped", "latency", message)))
    machine = plan.machine
    with progress.task("time of both models", 1) as advance:
        folders: tuple[Path, Path] = (reference.source.folder, candidate.loadable)
        models = [load_model(folder, machine.device, machine.compute, as_served=True) for folder in folders]
        turns = take_turns(spec, models[0], models[1], plan.dimensions.vocabulary)
        advance("")
    del models
    gc.collect()
    measure(turns, evidence.source, evidence.compressed)
    return evidence
