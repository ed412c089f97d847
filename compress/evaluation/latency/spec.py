"""What a recipe says about measuring time."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

PARTS = ("prefill", "decode")


class Latency(BaseModel):
    """Seconds of reading a prompt (prefill) and of each token written after it (decode), source and compressed model in turns through the public loader on this machine; other runtimes have other kernels. Measures: latency.prefill_seconds, latency.decode_seconds."""  # noqa: E501

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Literal["latency"] = "latency"
    prompt_tokens: int = Field(default=128, gt=1, description="tokens of the prompt")
    new_tokens: int = Field(default=16, gt=0, description="tokens written after it")
    batch: int = Field(default=1, gt=0, description="sequences at once")
    repeats: int = Field(default=8, ge=3, description="turns of each model that count; one more warms up")

    @property
    def measures(self) -> list[str]:
        return [f"latency.{part}_seconds" for part in PARTS]
