"""How far a mixture may be from its source on tuning text: what the smallest one is looked for within."""

from __future__ import annotations

import math

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Bounds(BaseModel):
    """One of both, or both."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    max_kl: float | None = Field(default=None, ge=0, description="mean KL to the source, nats a token")
    max_perplexity_ratio: float | None = Field(default=None, gt=0, description="perplexity over the source's")

    @model_validator(mode="after")
    def _some(self) -> Bounds:
        if self.max_kl is None and self.max_perplexity_ratio is None:
            raise ValueError("bounds without max_kl and max_perplexity_ratio bound nothing")
        return self

    def hold(self, kl: float, lost: float, share: float) -> bool:
        """Whether a mean KL and a rise of the loss (nats a token) use at most `share` of what the bounds allow; all of
        it where they allow no rise."""
        if self.max_kl is not None and kl > share * self.max_kl:
            return False
        if self.max_perplexity_ratio is None:
            return True
        allowed = self.max_perplexity_ratio - 1
        return math.expm1(min(lost, 700.0)) <= (share * allowed if allowed > 0 else allowed)

    @property
    def words(self) -> str:
        said = [] if self.max_kl is None else [f"a mean KL of {self.max_kl:g}"]
        if self.max_perplexity_ratio is not None:
            said.append(f"{self.max_perplexity_ratio:g} times the source's perplexity")
        return " and ".join(said)
