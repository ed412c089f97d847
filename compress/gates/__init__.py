"""The registry of gates: a union of their configs, told apart by `kind`. Adding one is one file and one line here.

A gate is a pure function of measurements: it sees numbers and event counts, never a model or a report.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from compress.gates.base import Facts, Gate, Judgement
from compress.gates.events import EventsGate
from compress.gates.latency import LatencyGate
from compress.gates.memory import MemoryGate
from compress.gates.non_inferiority import NonInferiorityGate
from compress.gates.relative import RelativeGate
from compress.gates.size import SizeGate
from compress.gates.threshold import ThresholdGate
from compress.gates.verdict import adjusted, overall

AnyGate = Annotated[
    ThresholdGate | RelativeGate | NonInferiorityGate | EventsGate | SizeGate | MemoryGate | LatencyGate,
    Field(discriminator="kind"),
]

GATES: dict[str, type[Gate]] = {
    "threshold": ThresholdGate,
    "relative": RelativeGate,
    "non_inferiority": NonInferiorityGate,
    "events": EventsGate,
    "size": SizeGate,
    "memory": MemoryGate,
    "latency": LatencyGate,
}

__all__ = [
    "GATES",
    "AnyGate",
    "EventsGate",
    "Facts",
    "Gate",
    "Judgement",
    "LatencyGate",
    "MemoryGate",
    "NonInferiorityGate",
    "RelativeGate",
    "SizeGate",
    "ThresholdGate",
    "adjusted",
    "overall",
]
