"""What a training run works with, whichever objective it has."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.checkpoints.reader import Checkpoint
from compress.checkpoints.skeleton import Skeleton
from compress.events import Progress
from compress.training.clock import Clock
from compress.training.descent import Course
from compress.training.material import Material
from compress.training.student import AsExported, Unquantised
from compress.training.trained import Trainable


@dataclass(frozen=True)
class Setting:
    """`origin` is the teacher with a skeleton of its own, for the student may be smaller; `source` is the student.

    `folder` holds what a killed run goes on from.
    """

    origin: Checkpoint
    teacher: Skeleton
    source: AsExported
    skeleton: Skeleton
    material: Material
    training: Trainable
    products: torch.dtype
    hidden_share: float
    course: Course
    folder: Path
    clock: Clock
    progress: Progress
    unquantised: Unquantised = lambda linear: None
    """Weights of linears (rows, columns) before they were quantised."""
    kept_blocks: int = 0
    """Blocks whose inside is kept between the passes of a step, where the whole model is trained."""


@dataclass(frozen=True)
class Outcome:
    """New tensors by stored name, in the stored dtype; mean KL in nats on the windows kept out; what else to tell."""

    values: dict[str, Tensor]
    before: float
    after: float
    facts: dict[str, Any]
