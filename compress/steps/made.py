"""What is exported: the last stage's checkpoint, or the codes of a version that is there already."""

from __future__ import annotations

from dataclasses import dataclass

from compress.checkpoints.reader import Checkpoint
from compress.events import Event, Progress
from compress.memory.measure import PeakSampler
from compress.reports.report import StageRecord
from compress.steps.fold import fold, stage_events
from compress.steps.parent import Parent
from compress.steps.plan import Plan
from compress.steps.source import OpenedSource
from compress.steps.texts import Texts


@dataclass(frozen=True)
class Made:
    """A compressed checkpoint with the record of its making."""

    checkpoint: Checkpoint
    stages: list[StageRecord]
    events: list[Event]


def compress(plan: Plan, source: OpenedSource, texts: Texts, progress: Progress, sampler: PeakSampler) -> Made:
    """Apply every stage of the recipe."""
    folded = fold(
        plan.recipe.stages,
        source.checkpoint,
        source.digest,
        texts.calibration,
        plan.recipe.seed,
        plan.machine,
        plan.stored,
        progress,
        sampler,
    )
    records = [StageRecord(**folding.record) for folding in folded]
    return Made(folded[-1].checkpoint, records, stage_events(folded))


def from_parent(parent: Parent) -> Made:
    """Nothing is compressed again: the record is the parent's."""
    return Made(parent.checkpoint, parent.stages, list(parent.events))
