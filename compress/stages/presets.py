"""What `quality` stands for when it takes more than one stage: the stages that follow.

A stage knows no other stage, so this is kept beside the registry. The recipe that is stored has them written out.
"""

from __future__ import annotations

from compress.stages.base import Stage
from compress.stages.gptq import Gptq
from compress.stages.recover import Recover

MAX_RECOVER = Recover(epochs=2, learning_rate=2e-3, self_generated_windows=64)
"""Training that `quality: max` adds. More text beats more epochs over the same text, and the model can write it; see
docs/benchmarks/ablation.md."""


def written_out(stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
    """The stages with those that a quality implies: `recover` after the last gptq of quality max.

    A recipe that has a recover stage of its own is left as it is, so that a resolved recipe runs as it says.
    """
    wanted = [index for index, stage in enumerate(stages) if isinstance(stage, Gptq) and stage.quality == "max"]
    if not wanted or any(isinstance(stage, Recover) for stage in stages):
        return stages
    return (*stages[: wanted[-1] + 1], MAX_RECOVER, *stages[wanted[-1] + 1 :])
