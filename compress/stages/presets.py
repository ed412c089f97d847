"""What `quality` stands for when it takes more than one stage: the stages that follow.

A stage knows no other stage, so this is kept beside the registry. The recipe that is stored has them written out.
"""

from __future__ import annotations

from typing import Any

from compress.stages.base import Stage
from compress.stages.gptq import PRESETS, Gptq
from compress.stages.recover import Recover

MAX_RECOVER = Recover()
"""Training that `quality: max` adds, at its defaults. Text sampled from the source would help, but
sampling takes the whole model in memory; a recipe that can afford it has a recover stage of its own."""


def forget_quality(stage: dict[str, Any]) -> None:
    """Drop the fields that a quality fills in from a stage that is given another one; those of a resolved recipe would
    win over it, and only the label would change."""
    for field in {field for preset in PRESETS.values() for field in preset}:
        stage.pop(field, None)


def written_out(stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
    """The stages with those that a quality implies: `recover` after the last gptq of quality max.

    A recipe that has a recover stage of its own is left as it is, so that a resolved recipe runs as it says.
    """
    wanted = [index for index, stage in enumerate(stages) if isinstance(stage, Gptq) and stage.quality == "max"]
    if not wanted or any(isinstance(stage, Recover) for stage in stages):
        return stages
    return (*stages[: wanted[-1] + 1], MAX_RECOVER, *stages[wanted[-1] + 1 :])
