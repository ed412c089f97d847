"""What a recipe can ask to have measured."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field, field_validator, model_validator

from compress.calibration.texts import SelfGenerated, TextSource
from compress.calibration.window_specs import WindowSpec
from compress.evaluation.latency.spec import Latency
from compress.evaluation.looks import look_sizes
from compress.evaluation.prompts.spec import Prompts
from compress.evaluation.tasks.spec import Task


class EvaluationSpec(WindowSpec):
    """A named held-out text. `set` is the name in measurements; by default that of the text."""

    set: str = Field(
        default="",
        pattern=r"^[A-Za-z0-9_-]*$",
        description="name in measurements; default: the text's, of one given inline its kind",
    )
    windows: int = Field(default=32, gt=1, description="number of windows; at least 2, so that there is an interval")

    max_windows: int | None = Field(
        default=None, description="up to how many may be read where a non_inferiority gate cannot decide"
    )

    @model_validator(mode="after")
    def _growing(self) -> EvaluationSpec:
        if self.max_windows is not None and self.max_windows < self.windows:
            raise ValueError(f"max_windows {self.max_windows} is less than windows {self.windows}")
        return self

    @property
    def looks(self) -> tuple[int, ...]:
        """Windows at each look."""
        return look_sizes(self.windows, self.max_windows or self.windows)

    @field_validator("data")
    @classmethod
    def _held_out(cls, value: str | TextSource) -> str | TextSource:
        if value == "self-generated" or isinstance(value, SelfGenerated):
            raise ValueError("text sampled from the model cannot judge the model; name a held-out text")
        return value

    @property
    def set_name(self) -> str:
        return self.set or (self.data if isinstance(self.data, str) else self.data.kind)

    @property
    def window_spec(self) -> WindowSpec:
        """Of all windows that may be read."""
        windows = self.max_windows or self.windows
        return WindowSpec(data=self.data, windows=windows, window_tokens=self.window_tokens, layout=self.layout)


class Perplexity(EvaluationSpec):
    """exp of the mean negative log-likelihood per token. Windows do not overlap; each token but a window's first is predicted from those before it in the window. Measures: perplexity.<set>."""  # noqa: E501

    kind: Literal["perplexity"] = "perplexity"

    @property
    def measures(self) -> list[str]:
        return [f"perplexity.{self.set_name}"]


class Divergence(EvaluationSpec):
    """KL(source || compressed) per token in nats over the whole vocabulary, both models reading the same tokens. Measures: divergence.<set>.mean_kl, .median_kl, .kl_p99, .kl_p999, .max_kl, .top1_agreement."""  # noqa: E501

    kind: Literal["divergence"] = "divergence"

    @property
    def measures(self) -> list[str]:
        return [f"divergence.{self.set_name}.{name}" for name in DIVERGENCE_NAMES]


DIVERGENCE_NAMES = ("mean_kl", "median_kl", "kl_p99", "kl_p999", "max_kl", "top1_agreement")
OnText = Perplexity | Divergence
AnyEvaluation = Annotated[Perplexity | Divergence | Task | Prompts | Latency, Field(discriminator="kind")]
EVALUATIONS: dict[str, type[BaseModel]] = {
    "perplexity": Perplexity,
    "divergence": Divergence,
    "task": Task,
    "prompts": Prompts,
    "latency": Latency,
}
