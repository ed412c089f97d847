"""A bound on the memory of the served model: weights, KV cache, or both."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from compress.gates.base import Facts, Gate, Judgement, Verdict

PARTS: dict[str, tuple[str, ...]] = {
    "resident": ("resident_bytes",),
    "kv_cache": ("kv_cache_bytes",),
    "serving": ("resident_bytes", "kv_cache_bytes"),
}
"""What is added up for each `what`, as measured in the round trip."""


class MemoryGate(Gate):
    """A bound on memory as measured when the export is reloaded: weights, KV cache at the export's context and concurrency, or both (`serving`)."""  # noqa: E501

    kind: Literal["memory"] = "memory"
    what: Literal["resident", "kv_cache", "serving"] = Field(
        default="serving", description="resident: weights; kv_cache: keys and values; serving: their sum"
    )
    max_bytes: int = Field(gt=0, description="most bytes")

    @property
    def measures(self) -> list[str]:
        return list(PARTS[self.what])

    def judge(self, facts: Facts) -> Judgement:
        measure, limit = f"memory.{self.what}", f"<= {self.max_bytes:,} bytes"
        found = [facts.compressed.get(name) for name in PARTS[self.what]]
        values = [value for value in found if value is not None]
        if len(values) < len(found):
            sentence = f"{measure} was not measured: the export was not reloaded through its public loader; failed."
            return Judgement(self.kind, measure, None, None, limit, "failed", sentence)
        total = sum(values)
        verdict: Verdict = "passed" if total <= self.max_bytes else "failed"
        sentence = f"{measure} is {total:,.0f} bytes; the bound is {limit}: {verdict}."
        return Judgement(self.kind, measure, total, None, limit, verdict, sentence)
