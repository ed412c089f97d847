"""A bound on how often the run departed from the plan."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from compress.errors import nearest
from compress.events import EVENT_KINDS
from compress.gates.base import Facts, Gate, Judgement


class EventsGate(Gate):
    """A bound on the number of events of one kind (fallbacks, shortfalls, skipped checks)."""

    kind: Literal["events"] = "events"
    event: str = Field(description="an event kind, e.g. rounding_fallback; `compress kinds` lists them")
    max: int = Field(default=0, ge=0, description="most events allowed")

    @field_validator("event")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in EVENT_KINDS:
            raise ValueError(
                f"no event is called {value!r}.{nearest(value, EVENT_KINDS)} Known: {', '.join(EVENT_KINDS)}"
            )
        return value

    def judge(self, facts: Facts) -> Judgement:
        measure = f"events.{self.event}"
        count = facts.event_counts.get(self.event)
        limit = f"<= {self.max}"
        if count is None:
            sentence = f"{self.event} events were not counted, so the gate fails."
            return Judgement(self.kind, measure, None, None, limit, "failed", sentence)
        verdict: Literal["passed", "failed"] = "passed" if count <= self.max else "failed"
        sentence = f"{count} {self.event} event{'' if count == 1 else 's'}; at most {self.max} allowed: {verdict}."
        return Judgement(self.kind, measure, float(count), None, limit, verdict, sentence)
