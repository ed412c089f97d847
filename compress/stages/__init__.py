"""The registry of stages: a union of their configs, told apart by `kind`. Adding one is one file and one line here."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from compress.stages.base import Stage, StageContext, StageOutcome
from compress.stages.bitsandbytes import BitsAndBytesStage
from compress.stages.gptq import Gptq
from compress.stages.kv_cache import KvCache
from compress.stages.mixed_precision import MixedPrecision
from compress.stages.recover import Recover
from compress.stages.round_to_nearest import RoundToNearest
from compress.stages.sensitivity import Sensitivity
from compress.stages.smooth import Awq, SmoothQuant
from compress.stages.sparsify import Sparsify
from compress.stages.structured_prune import StructuredPrune
from compress.stages.vocabulary import Vocabulary

AnyStage = Annotated[
    StructuredPrune
    | Sparsify
    | SmoothQuant
    | Awq
    | RoundToNearest
    | Gptq
    | BitsAndBytesStage
    | Recover
    | Sensitivity
    | MixedPrecision
    | Vocabulary
    | KvCache,
    Field(discriminator="kind"),
]

STAGES: dict[str, type[Stage]] = {
    "structured_prune": StructuredPrune,
    "sparsify": Sparsify,
    "smoothquant": SmoothQuant,
    "awq": Awq,
    "round_to_nearest": RoundToNearest,
    "gptq": Gptq,
    "bitsandbytes": BitsAndBytesStage,
    "recover": Recover,
    "sensitivity": Sensitivity,
    "mixed_precision": MixedPrecision,
    "vocabulary": Vocabulary,
    "kv_cache": KvCache,
}

__all__ = [
    "STAGES",
    "AnyStage",
    "Awq",
    "BitsAndBytesStage",
    "Gptq",
    "KvCache",
    "MixedPrecision",
    "Recover",
    "RoundToNearest",
    "Sensitivity",
    "SmoothQuant",
    "Sparsify",
    "Stage",
    "StageContext",
    "StageOutcome",
    "StructuredPrune",
    "Vocabulary",
]
