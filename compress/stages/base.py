"""What every stage is: a frozen config that checks itself against a model's shapes, and `apply`: folder in, folder out.

A stage knows no other stage and never sees a recipe.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict

from compress.architecture import Architecture, Dimensions
from compress.calibration.windows import Windows
from compress.checkpoints.reader import Checkpoint
from compress.checkpoints.skeleton import Skeleton
from compress.checkpoints.working import WorkingCheckpoint
from compress.events import Event, Progress
from compress.quantization.scheme import Scheme
from compress.training.footprint import Mode
from compress.training.trained import Trainable

Shapes = dict[str, tuple[int, int]]
"""(rows, columns) of every linear of every block, by full module name; or of embedding and head (`on_vocabulary`)."""


@dataclass(frozen=True)
class StageContext:
    """What a stage works with. `stored` is the 16-bit dtype scales are kept in; compute happens in `compute`."""

    origin: Checkpoint
    """The model the run started from; `source` is what the stage before left of it."""
    source: Checkpoint
    output: WorkingCheckpoint
    windows: Windows | None
    device: torch.device
    compute: torch.dtype
    stored: torch.dtype
    tokens_at_once: int
    seed: int
    """The recipe's: of every draw a stage makes."""
    progress: Progress
    chain: tuple[Checkpoint, ...] = ()
    """What each stage before this one worked on, the origin first."""
    after_block: Callable[[int], None] = field(default=lambda index: None)
    """Called when a block has been written (on a GPU, when it is about to be); tests stop at a known place with it."""


@dataclass(frozen=True)
class StageOutcome:
    """Per-module records (see reports.report.ModuleRecord), events, seconds by part, and what else is worth telling."""

    modules: list[dict[str, Any]]
    events: list[Event]
    seconds_by_part: dict[str, float]
    facts: dict[str, Any] = field(default_factory=dict)
    seconds_before: float = 0.0
    """Of `seconds_by_part`, what interrupted runs had taken."""


@dataclass(frozen=True)
class Training:
    """`forwards`: forward passes that each calibration token costs in sum, a backward pass counted as two."""

    forwards: float
    batch_tokens: int
    more_windows: int
    """Windows beside the calibration text's."""
    mode: Mode
    trained: Trainable


class Stage(BaseModel):
    """Base of all stage configs. Subclasses have a Literal `kind`, and a docstring that `compress kinds` shows."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    needs_calibration: ClassVar[bool] = False
    plans_precision: ClassVar[bool] = False
    """Leaves a plan that later stages can follow."""
    draws: ClassVar[bool] = False
    """Draws at random, so that the recipe's seed decides its output."""
    shares_windows: ClassVar[bool] = False
    """Whether several processes may apply the stage together, each on its share of the windows: `compress.parallel`."""
    batches_at_least: ClassVar[int] = 1
    """Batches that calibration text is cut into where it has as many windows."""
    on_vocabulary: ClassVar[bool] = False
    """Works on the embedding and the head: `check` and `schemes` are then given their shapes, not those of linears."""
    version: ClassVar[int] = 1
    """Raised when a change of code changes results: part of the fingerprint of finished stages."""

    @property
    def changed_fields(self) -> set[str]:
        """Fields that were given another value than their default."""
        fields = type(self).model_fields
        return {name for name in self.model_fields_set if getattr(self, name) != fields[name].default}

    @property
    def beside_linears(self) -> bool:
        """Whether it works on the embedding and the head beside linears: `check` is then given the shapes of all."""
        return False

    @property
    def needs_codes(self) -> bool:
        """Whether it works on linears that stages before it quantised; `plan` refuses a recipe where there are none."""
        return False

    @property
    def needs_weights(self) -> bool:
        """Whether it works on plain weights; `plan` refuses a recipe where a stage before quantised some."""
        return False

    @property
    def follows_plan(self) -> bool:
        """Whether its schemes are those of a precision plan that a stage before made."""
        return False

    @property
    def activation_streams(self) -> float:
        """Sets of calibration activations the stage holds at once, 0.25 for a quarter of one beside: what `plan`
        predicts memory and time from."""
        return 1 if self.needs_calibration else 0

    @property
    def replays(self) -> bool:
        """Whether blocks are run again and again rather than held, so that one batch at a time is inside."""
        return False

    @property
    def compares(self) -> bool:
        """Whether the run is to quantise the source alone as well, for comparison."""
        return False

    @property
    def judges_shifts(self) -> bool:
        """Whether the sums that a shift is computed from are kept twice: of most text, and of text held out."""
        return False

    @property
    def training(self) -> Training | None:
        """What a stage that trains does with its windows, for `plan` to predict time and memory; None for others."""
        return None

    @property
    def forwards(self) -> float:
        """Forward passes over the calibration text that the stage's arithmetic amounts to."""
        return self.activation_streams

    def output_tokens_read(self, window_tokens: int) -> int:
        """Calibration tokens, in windows of so many, of a backward pass that tells what the output depends on."""
        return 0

    @property
    def refines(self) -> bool:
        """Whether some calibration text is held out to judge refinements: more matrices, more arithmetic."""
        return False

    @property
    def kv_bytes(self) -> int | None:
        """Bytes of an element of the KV cache that the stage prepares for; None where it leaves that alone."""
        return None

    def added_bytes(self, dimensions: Dimensions, stored_bytes: int) -> int:
        """Bytes of tensors that the stage adds to the model."""
        return 0

    def extra_disk_bytes(self, shapes: Shapes) -> int:
        """Bytes of the cache that the stage fills beside its output checkpoint."""
        return 0

    def configured(self, config: dict[str, Any], stored_bytes: int) -> dict[str, Any]:
        """config.json of the output for that of the input: what `plan` knows later stages' shapes from. `stored_bytes`
        is what one weight of the 16-bit dtype takes.

        Raises RecipeError where the result could not be.
        """
        del stored_bytes
        return config

    def other_configs(self, config: dict[str, Any], stored_bytes: int) -> list[dict[str, Any]]:
        """What the config may be besides `configured`, where that depends on what is measured."""
        del config, stored_bytes
        return []

    def check(self, shapes: Shapes, architecture: Architecture) -> list[str]:
        """Mistakes that can be known before work starts, one sentence each."""
        raise NotImplementedError

    def schemes(self, shapes: Shapes) -> dict[str, Scheme]:
        """Schemes of the modules this stage will quantise: what `plan` predicts bytes from."""
        raise NotImplementedError

    def apply(self, context: StageContext) -> StageOutcome:
        """Write the whole output checkpoint, except its final stage.json."""
        raise NotImplementedError


def rank_deficient(windows: Windows, skeleton: Skeleton) -> list[Event]:
    """Fewer tokens than columns leave H rank deficient: damping then does the work, and the report should say so."""
    widest = max(columns for _, columns in skeleton.linear_shapes().values())
    if windows.tokens >= widest:
        return []
    message = f"{windows.tokens} calibration tokens for inputs of up to {widest} columns: the Hessian is rank deficient"
    return [Event("few_calibration_tokens", "calibration", message, {"tokens": windows.tokens, "columns": widest})]


def restore(record: dict[str, Any]) -> tuple[list[dict[str, Any]], list[Event]]:
    """Modules and events of a finished block, from its record."""
    return record["modules"], [Event(**event) for event in record["events"]]
