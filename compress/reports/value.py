"""What every part of a report is: a frozen value without unknown keys."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

Verdict = Literal["passed", "failed", "inconclusive"]


class Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
