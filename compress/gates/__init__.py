"""The registry of gates: a union of their configs, told apart by `kind`. Adding one is one file and one line here.

A gate is a pure function of measurements: it sees numbers and event counts, never a model or a report.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

from pydantic import Field

from compress.gates.base import Facts, Gate, Judgement, Verdict
from compress.gates.events import EventsGate
from compress.gates.relative import RelativeGate
from compress.gates.threshold import ThresholdGate

AnyGate = Annotated[ThresholdGate | RelativeGate | EventsGate, Field(discriminator="kind")]

GATES: dict[str, type[Gate]] = {"threshold": ThresholdGate, "relative": RelativeGate, "events": EventsGate}


def overall(judgements: Iterable[Judgement]) -> Verdict:
    """Failed if any failed, else inconclusive if any is, else passed. No judgement at all is a failure."""
    verdicts = {judgement.verdict for judgement in judgements}
    if not verdicts or "failed" in verdicts:
        return "failed"
    return "inconclusive" if "inconclusive" in verdicts else "passed"


__all__ = ["GATES", "AnyGate", "EventsGate", "Facts", "Gate", "Judgement", "RelativeGate", "ThresholdGate", "overall"]
