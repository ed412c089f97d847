"""The registry of stages: a union of their configs, told apart by `kind`. Adding one is one file and one line here."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from compress.stages.base import Stage, StageContext, StageOutcome
from compress.stages.gptq import Gptq
from compress.stages.recover import Recover
from compress.stages.round_to_nearest import RoundToNearest

AnyStage = Annotated[RoundToNearest | Gptq | Recover, Field(discriminator="kind")]

STAGES: dict[str, type[Stage]] = {"round_to_nearest": RoundToNearest, "gptq": Gptq, "recover": Recover}

__all__ = ["STAGES", "AnyStage", "Gptq", "Recover", "RoundToNearest", "Stage", "StageContext", "StageOutcome"]
