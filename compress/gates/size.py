"""A bound on what the artifact takes on disk."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from compress.gates.base import Facts, Gate, Judgement, Verdict, number_text, within


class SizeGate(Gate):
    """Bounds on the artifact's size: bytes of its tensors, their ratio to the source's, effective bits. All given must hold."""  # noqa: E501

    kind: Literal["size"] = "size"
    max_bytes: int | None = Field(default=None, gt=0, description="most bytes of tensors in the exported files")
    max_ratio: float | None = Field(default=None, gt=0, description="most bytes, as a fraction of the source's")
    max_effective_bits: float | None = Field(default=None, gt=0, description="most bits a quantised weight, scales in")

    @model_validator(mode="after")
    def _bounded(self) -> SizeGate:
        if self.max_bytes is None and self.max_ratio is None and self.max_effective_bits is None:
            raise ValueError("give max_bytes, max_ratio or max_effective_bits: a gate without a bound judges nothing")
        return self

    @property
    def measures(self) -> list[str]:
        bytes_ = self.max_bytes is not None or self.max_ratio is not None
        return ["weight_bytes"] * bytes_ + ["effective_bits"] * (self.max_effective_bits is not None)

    def judge(self, facts: Facts) -> Judgement:
        size, bits = facts.compressed.get("weight_bytes"), facts.compressed.get("effective_bits")
        before = facts.source_bytes
        checks = [
            ("weight_bytes", size, self.max_bytes, ""),
            (
                "weight_bytes",
                size / before if size is not None and before else None,
                self.max_ratio,
                " x the recipe's source",
            ),
            ("effective_bits", bits, self.max_effective_bits, ""),
        ]
        given = [(measure, value, bound, suffix) for measure, value, bound, suffix in checks if bound is not None]
        missed = [check for check in given if check[1] is None or not within(check[1], None, check[2])]
        measure, observed, _, suffix = (missed or given)[0]
        verdict: Verdict = "failed" if missed else "passed"
        limit = " and ".join(f"{name} <= {_bound_text(name, bound, suffix)}" for name, _, bound, suffix in given)
        if observed is None:
            return Judgement(self.kind, measure, None, None, limit, "failed", f"{measure} is not known: failed.")
        shown = f"{observed:.4g}{suffix}" if suffix else number_text(measure, observed)
        sentence = f"{measure} is {shown}; the bound is {limit}: {verdict}."
        return Judgement(self.kind, measure, observed, None, limit, verdict, sentence)


def _bound_text(measure: str, bound: float, suffix: str) -> str:
    return f"{bound:g}{suffix}" if suffix else number_text(measure, bound)
