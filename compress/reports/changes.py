"""What differs between a version and the release before it, as frozen values of a report."""

from __future__ import annotations

from pydantic import Field

from compress.reports.value import Value, Verdict


class MeasureChange(Value):
    """One measurement of the previous release and of this version."""

    name: str
    previous: float
    current: float
    interval_previous: tuple[float, float] | None = None
    interval_current: tuple[float, float] | None = None
    overlap: bool | None = Field(description="the 95 % intervals overlap; None where one of them is missing")


class GateChange(Value):
    """One gate in both reports; None where one of them has no such gate."""

    kind: str
    measure: str
    previous: Verdict | None
    current: Verdict | None
    limit_previous: str | None
    limit_current: str | None


class RecipeChange(Value):
    """One value that differs between the resolved recipes, as text; None where one of them has no such key."""

    path: str = Field(description="as `--set` takes it, e.g. stages.0.bits")
    previous: str | None
    current: str | None


class SchemeChange(Value):
    """How many linears have a scheme in the end."""

    scheme: str
    previous: int
    current: int


class PreviousRecord(Value):
    """The release before this version, and what differs from it."""

    name: str
    version: str
    path: str
    digest: str = Field(description="of its model, as its own report has it; empty if that could not be read")
    verdict: str = Field(default="", description="of that release; empty if that could not be read")
    chosen: str = Field(description="why this one: promoted to a channel, or the newest that passed")
    problem: str = Field(default="", description="why its report could not be compared; nothing is below then")
    comparable: bool = Field(default=True, description="both were measured against the same source on the same texts")
    weight_bytes: tuple[float, float] | None = Field(
        default=None, description="of the previous release, of this version"
    )
    measures: list[MeasureChange] = Field(default_factory=list)
    gates: list[GateChange] = Field(default_factory=list)
    recipe: list[RecipeChange] = Field(default_factory=list)
    schemes: list[SchemeChange] = Field(default_factory=list, description="those whose counts differ")
    linears_changed: int = Field(default=0, description="linears of both with another scheme, or in one of them only")
