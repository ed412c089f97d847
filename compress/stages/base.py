"""What every stage is: a frozen config that checks itself against a model's shapes, and `apply`: folder in, folder out.

A stage knows no other stage and never sees a recipe.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict

from compress.architecture import Architecture
from compress.calibration.windows import Windows
from compress.checkpoints.reader import Checkpoint
from compress.checkpoints.working import WorkingCheckpoint
from compress.events import Event, Progress
from compress.quantization.scheme import Scheme

Shapes = dict[str, tuple[int, int]]
"""(rows, columns) of every linear of every block, by full module name."""


@dataclass(frozen=True)
class StageContext:
    """What a stage works with. `stored` is the 16-bit dtype scales are kept in; compute happens in `compute`."""

    source: Checkpoint
    output: WorkingCheckpoint
    windows: Windows | None
    device: torch.device
    compute: torch.dtype
    stored: torch.dtype
    tokens_at_once: int
    progress: Progress
    after_block: Callable[[int], None] = field(default=lambda index: None)
    """Called when a block has been written; tests use it to stop at a known place."""


@dataclass(frozen=True)
class StageOutcome:
    """Per-module records (see reports.report.ModuleRecord), events, and seconds by part."""

    modules: list[dict[str, Any]]
    events: list[Event]
    seconds_by_part: dict[str, float]


class Stage(BaseModel):
    """Base of all stage configs. Subclasses have a Literal `kind`, and a docstring that `compress kinds` shows."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    needs_calibration: ClassVar[bool] = False
    shares_windows: ClassVar[bool] = False
    """Whether several processes may apply the stage together, each on its share of the windows: `compress.parallel`."""
    version: ClassVar[int] = 1
    """Raised when a change of code changes results: part of the fingerprint of finished stages."""

    @property
    def activation_streams(self) -> float:
        """Sets of calibration activations the stage holds at once, 0.25 for a quarter of one beside: what `plan`
        predicts memory and time from."""
        return 1 if self.needs_calibration else 0

    def check(self, shapes: Shapes, architecture: Architecture) -> list[str]:
        """Mistakes that can be known before work starts, one sentence each."""
        raise NotImplementedError

    def schemes(self, shapes: Shapes) -> dict[str, Scheme]:
        """Schemes of the modules this stage will quantise: what `plan` predicts bytes from."""
        raise NotImplementedError

    def apply(self, context: StageContext) -> StageOutcome:
        """Write the whole output checkpoint, except its final stage.json."""
        raise NotImplementedError


def restore(record: dict[str, Any]) -> tuple[list[dict[str, Any]], list[Event]]:
    """Modules and events of a finished block, from its record."""
    return record["modules"], [Event(**event) for event in record["events"]]
