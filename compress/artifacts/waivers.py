"""Waivers: who allows a version to go on although gates did not pass, why, and until when.

A waiver is a line of the name's history and nothing else, so it is there completely or not at all, and for ever. What
is signed is the canonical JSON of its value: sorted keys, no spaces, ASCII only. By hand:

    grep '"event":"waived"' history.jsonl | tail -1 | jq -jcaS .waiver > waiver
    grep '"event":"waived"' history.jsonl | tail -1 | jq -r .signature > waiver.sig
    ssh-keygen -Y verify -n compress-waiver -f allowed_signers -I anna@example.org -s waiver.sig < waiver
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, time
from pathlib import Path
from typing import Any

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from compress.artifacts.history import History
from compress.artifacts.lines import Line, canonical
from compress.artifacts.manifest import Sha256
from compress.artifacts.signing import SIGNERS_NAME, Checked, Signature, check
from compress.artifacts.words import visible
from compress.errors import CompressError, EnvironmentLacksError, RecipeError, nearest

_UNTIL = re.compile(r"\d{4}-\d{2}-\d{2}(?P<time>[T ].+)?")
VERDICT = "verdict"
"""Stands for the verdict itself, where it is not `passed` although no single gate says why."""


class WaiverValue(BaseModel):
    """What is signed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    version: str
    digest: Sha256 = Field(description="of the version's manifest")
    gates: tuple[str, ...] = Field(min_length=1, description="KIND:MEASURE of each gate that is waived")
    reason: str = Field(min_length=1)
    until: AwareDatetime
    by: str = Field(min_length=1)
    at: AwareDatetime
    signed_by: str = Field(default="", description="`ssh SHA256:...` or `gpg <fingerprint>`; empty if unsigned")

    def signed_bytes(self) -> bytes:
        return canonical(self.model_dump(mode="json"))


@dataclass(frozen=True)
class Waiver:
    """A waiver as the history has it."""

    name: str
    label: str
    digest: str
    gates: tuple[str, ...]
    reason: str
    until: datetime
    who: str
    at: datetime
    signed_by: str | None
    line: int
    value: WaiverValue
    signature: str | None

    def expired(self, now: datetime | None = None) -> bool:
        return (now or datetime.now(UTC)) > self.until


@dataclass(frozen=True)
class Gate:
    """A gate of a report that did not pass."""

    key: str
    kind: str
    measure: str
    decisive: bool
    sentence: str


def of_history(history: History, label: str | None = None) -> list[Waiver]:
    """Every waiver of a name, or of one version, in the order they were given; expired ones too."""
    found = [_of_line(line) for line in history.lines if line.event == "waived"]
    return [waiver for waiver in found if waiver is not None and label in (None, waiver.label)]


def unread(history: History) -> list[str]:
    """Waivers that are no waivers."""
    lines = [line for line in history.lines if line.event == "waived" and _of_line(line) is None]
    return [f"history.jsonl: line {line.seq} is not a waiver of the version it names" for line in lines]


def signers_of(root: Path) -> Path | None:
    """The store's allowed_signers; None where there is none, and anybody may sign.

    Raises CompressError for a link, which could name anybody's, and for anything else that is no file.
    """
    path = root / SIGNERS_NAME
    if path.is_symlink():
        raise CompressError(f"{path}: a link; who may sign is written in a plain file of the store")
    if path.exists() and not path.is_file():
        raise CompressError(f"{path}: not a plain file, so who may sign cannot be told; nobody's waiver counts")
    return path if path.is_file() else None


def check_signature(waiver: Waiver, signers: Path | None) -> Checked | None:
    """Whether the signature is one; None for an unsigned waiver."""
    if waiver.signature is None:
        return Checked("bad", "it names a key, but carries no signature") if waiver.signed_by else None
    return check(waiver.value.signed_bytes(), Signature(waiver.signature, waiver.signed_by or ""), signers)


def covers(waiver: Waiver, digest: str, signers: Path | None, now: datetime) -> str:
    """Why this waiver does not count for the version with that manifest digest; empty if it does.

    Where the store has allowed_signers, only those who are in it can waive.
    """
    if waiver.digest != digest:
        return "is about other bytes"
    if waiver.expired(now):
        return f"ended on {waiver.until:%Y-%m-%d}"
    try:
        checked = check_signature(waiver, signers)
    except EnvironmentLacksError as error:
        return f"cannot be checked: {error}"
    if checked and checked.state == "bad":
        return checked.sentence
    if signers is not None and not (checked and checked.state == "valid" and (waiver.signed_by or "")[:4] == "ssh "):
        return f"is not signed by anyone in {SIGNERS_NAME}"
    return ""


def gates_not_passed(folder: Path) -> list[Gate]:
    """From the report of an artifact, each gate that did not pass. Raises CompressError if there is none."""
    path = folder / "reports" / "report.json"
    try:
        gates: list[dict[str, Any]] = json.loads(path.read_bytes()).get("gates", [])
        return [
            Gate(
                f"{gate['kind']}:{gate['measure']}",
                gate["kind"],
                gate["measure"],
                gate.get("tier", "critical") != "advisory",
                gate["sentence"],
            )
            for gate in gates
            if gate["verdict"] != "passed"
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CompressError(f"{path}: no report that tells which gates failed ({type(error).__name__})") from error


def named_gates(gates: Iterable[Gate], asked: Iterable[str]) -> tuple[str, ...]:
    """`asked` (KIND, MEASURE or KIND:MEASURE) as keys of gates that did not pass. Raises RecipeError for all others."""
    listed = list(gates)
    known = {each.key for each in listed} or {VERDICT}
    found: set[str] = set()
    mistakes: list[str] = []
    for name in asked:
        hits = {each.key for each in listed if name in (each.key, each.kind, each.measure)}
        hits |= {VERDICT} if name == VERDICT and not listed else set()
        if not hits:
            words = known | {each.measure for each in listed} | {each.kind for each in listed}
            mistakes.append(
                f"--gate {name}: no gate of that name failed; waive {' or '.join(sorted(known))}.{nearest(name, words)}"
            )
        found |= hits
    if mistakes:
        raise RecipeError(mistakes)
    return tuple(sorted(found))


def read_until(text: str, now: datetime) -> datetime:
    """A date (until its end, UTC) or a moment with a zone. Raises RecipeError for what is neither, or past."""
    remedy = "write it as 2027-01-31 or 2027-01-31T12:00:00Z"
    shown = visible(text)
    matched = _UNTIL.fullmatch(text)
    try:
        moment = datetime.fromisoformat(text) if matched else None
    except ValueError:
        moment = None
    if moment is None or matched is None:
        raise RecipeError(f"--until {shown}: not a date; {remedy}")
    if not matched["time"]:
        moment = datetime.combine(moment.date(), time(23, 59, 59), UTC)
    if moment.tzinfo is None:
        raise RecipeError(f"--until {shown}: a moment needs a zone, e.g. {shown}Z")
    try:
        moment = moment.astimezone(UTC).replace(microsecond=0)
    except OverflowError:
        raise RecipeError(f"--until {shown}: lies before the year 1 or after the year 9999; {remedy}") from None
    if moment <= now:
        raise RecipeError(f"--until {shown}: is past; name the day on which somebody should look again")
    return moment


def _of_line(line: Line) -> Waiver | None:
    try:
        value = WaiverValue.model_validate_json(canonical(line.waiver))
    except (ValidationError, ValueError):
        return None
    if (value.version, value.digest) != (line.version, line.digest):
        return None
    return Waiver(
        name=value.name,
        label=value.version,
        digest=value.digest,
        gates=value.gates,
        reason=value.reason,
        until=value.until,
        who=value.by,
        at=value.at,
        signed_by=value.signed_by or None,
        line=line.seq,
        value=value,
        signature=line.signature,
    )
