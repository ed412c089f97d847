"""Stages that others imply: what `quality: max` trains afterwards, what `mixed_precision` chooses from.

A stage knows no other stage, so this is kept beside the registry. The recipe that is stored has them written out.
"""

from __future__ import annotations

from typing import Any

from compress.stages.base import Stage
from compress.stages.gptq import PRESETS, Gptq
from compress.stages.mixed_precision import MixedPrecision
from compress.stages.quantize import SAID_BY_K_QUANTS
from compress.stages.recover import Recover
from compress.stages.sensitivity import Sensitivity

FEW_BITS = 3
"""Up to so many, training moves codes too: a step of a code is large there, and the right side of it worth most."""


def after_max(stage: Gptq) -> Recover:
    """Training that `quality: max` adds, at its defaults. Text sampled from the source would help, but
    sampling takes the whole model in memory; a recipe that can afford it has a recover stage of its own."""
    few = isinstance(stage.bits, int) and stage.bits <= FEW_BITS
    return Recover(train="codes") if few else Recover()


def forget_quality(stage: dict[str, Any]) -> None:
    """Drop the fields that a quality fills in from a stage that is given another one; those of a resolved recipe would
    win over it, and only the label would change."""
    for field in {field for preset in PRESETS.values() for field in preset}:
        stage.pop(field, None)


def forget_grid(stage: dict[str, Any]) -> None:
    """Drop the fields that a K-quant leaves no choice of from a stage that becomes one: a resolved recipe has them."""
    if stage.get("k_quant"):
        for field in SAID_BY_K_QUANTS:
            stage.pop(field, None)


def written_out(stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
    """The stages with those that others imply: `sensitivity` before mixed_precision, `recover` after the last gptq of
    quality max.

    A recipe that has them itself is left as it is, so that a resolved recipe runs as it says.
    """
    stages = _with_sensitivity(stages)
    wanted = [index for index, stage in enumerate(stages) if isinstance(stage, Gptq) and stage.quality == "max"]
    if not wanted or any(isinstance(stage, Recover) for stage in stages[wanted[-1] :]):
        return stages
    last = stages[wanted[-1]]
    assert isinstance(last, Gptq)
    return (*stages[: wanted[-1] + 1], after_max(last), *stages[wanted[-1] + 1 :])


def _with_sensitivity(stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
    written: list[Stage] = []
    for stage in stages:
        if isinstance(stage, MixedPrecision) and not (written and isinstance(written[-1], Sensitivity)):
            written.append(Sensitivity(**stage.choice_fields))
        written.append(stage)
    return tuple(written)
