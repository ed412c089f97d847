"""One line of a history: what it may say, and the bytes that are hashed."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from compress.artifacts.manifest import Parent, Sha256

Event = Literal[
    "published",
    "rejected",
    "pulled",
    "exported",
    "promoted",
    "rolled_back",
    "waived",
    "pushed",
    "collected",
    "abandoned",
    "repaired",
    "broken",
]
ZERO = "0" * 64
"""What the first line has in place of a line before it."""
MADE: tuple[Event, ...] = ("published", "rejected", "pulled")
"""Events after which a version is there."""
MOVED: tuple[Event, ...] = ("promoted", "rolled_back")
"""Events after which a channel holds another version."""


class Draft(BaseModel):
    """What is known of a line before it has its place in the chain."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    event: Event
    who: str
    version: Annotated[str, Field(pattern=r"^[vr][0-9]{4,9}$")] | None = None
    digest: Sha256 | None = Field(default=None, description="of the version's manifest")
    detail: str = ""
    channel: str | None = None
    note: str | None = None
    parent: Parent | None = Field(default=None, description="of a version that was made from another")
    waiver: dict[str, Any] | None = Field(default=None, description="of a `waived` line: what is waived (waivers.py)")
    signature: str | None = Field(default=None, description="over the canonical JSON of `waiver`, armoured")
    undoes: int | None = Field(default=None, description="of an `abandoned` line: the line that was not carried out")
    recovered: bool | None = Field(default=None, description="written later, by whoever came next after a crash")


class Line(Draft):
    """One line of history.jsonl."""

    seq: int = Field(ge=1)
    at: AwareDatetime
    previous: Sha256 = Field(description="of the line before, without its newline; zeros in the first")

    def text(self) -> bytes:
        return canonical(self.model_dump(mode="json", exclude_none=True))

    @property
    def digest_of_line(self) -> str:
        return hashlib.sha256(self.text()).hexdigest()


def canonical(value: Any) -> bytes:
    """JSON with sorted keys, no spaces, ASCII only: the bytes that are hashed and signed."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def parse(raw: list[bytes], where: str) -> tuple[list[Line | None], list[str]]:
    """The lines of a file (None for what is none) and what is wrong with each by itself."""
    lines: list[Line | None] = []
    problems: list[str] = []
    for number, text in enumerate(raw, 1):
        try:
            line = Line.model_validate_json(text)
        except (ValidationError, UnicodeDecodeError):
            lines.append(None)
            problems.append(f"{where}: line {number} is not a line of a history: it has been edited")
            continue
        lines.append(line)
        if line.text() != text:
            problems.append(f"{where}: line {number} is not written as it was: it has been edited")
    return lines, problems


def check_chain(lines: list[Line | None], ends: tuple[str, ...], where: str) -> list[str]:
    """How lines do not follow each other. `ends`: the sha256 of each, as it is in the file."""
    problems: list[str] = []
    for number, line in enumerate(lines, 1):
        if line is None:
            continue
        if line.seq != number:
            problems.append(f"{where}: line {number} says it is line {line.seq}: lines were removed or moved")
        if line.previous != (ends[number - 2] if number > 1 else ZERO):
            problems.append(f"{where}: line {number} does not follow line {number - 1}, which has been edited")
    return problems
