"""Waive, and ask what waivers do: which count now, and which gates of a version none of them covers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from compress.artifacts import history, manifest, signing, waivers
from compress.artifacts.allowed import Cover, cover, whole
from compress.artifacts.lines import Draft
from compress.artifacts.manifest import ManifestError
from compress.artifacts.store import Store, Version
from compress.artifacts.waivers import Waiver, WaiverValue
from compress.artifacts.words import not_utf8
from compress.errors import RecipeError

T = TypeVar("T")


def waive(
    store: Store,
    name: str,
    label: str,
    gates: Sequence[str],
    reason: str,
    until: str,
    by: str | None = None,
    sign_with: Path | None = None,
    gpg_key: str | None = None,
    now: datetime | None = None,
) -> Waiver:
    """Answer for gates that did not pass. `until` is a date (to its end, UTC) or a moment.

    Raises RecipeError for mistakes, all together, and for an unsigned waiver where the store lists who may sign;
    CompressError for a version whose report is not the published one.
    """
    version = store.version(name, label)
    moment = (now or datetime.now(UTC)).replace(microsecond=0)
    found = whole(version, quick=False)
    failed = waivers.gates_not_passed(version.path)
    if found.verdict == "passed" and not failed:
        raise RecipeError(f"{version.reference} passed every gate: there is nothing to waive")
    signers = waivers.signers_of(store.root)
    asked = _Asked(tuple(gates), reason, until, by, sign_with, gpg_key)
    value = _value(asked, version, found.digest, failed, signers, moment)
    signature = _sign(value.signed_bytes(), sign_with, value.signed_by)
    _refuse_unlisted(value, signature, signers)
    draft = Draft(
        event="waived",
        who=value.by,
        version=version.label,
        digest=found.digest,
        detail=f"{', '.join(value.gates)} until {value.until:%Y-%m-%d}: {value.reason}",
        waiver=value.model_dump(mode="json"),
        signature=signature,
    )
    with store.locked(name) as past:
        line = history.append(store.home(name), past, [draft], at=moment)[0]
    return next(waiver for waiver in store.waivers(name, version.label) if waiver.line == line.seq)


@dataclass(frozen=True)
class _Asked:
    """What somebody gave for a waiver, unchecked."""

    gates: tuple[str, ...]
    reason: str
    until: str
    by: str | None
    sign_with: Path | None
    gpg_key: str | None


def _value(
    asked: _Asked, version: Version, digest: str, failed: Sequence[waivers.Gate], signers: Path | None, moment: datetime
) -> WaiverValue:
    """What will be signed. Raises RecipeError with every mistake together."""
    mistakes = not_utf8(("--by", asked.by), ("--reason", asked.reason))
    keys: tuple[str, ...] = _told(mistakes, lambda: waivers.named_gates(failed, asked.gates), ())
    ends = _told(mistakes, lambda: waivers.read_until(asked.until, moment), moment)
    if not asked.reason.strip():
        mistakes.append("--reason: say why; whoever reads this in a year knows nothing else")
    if asked.sign_with and asked.gpg_key:
        mistakes.append("--sign-with and --gpg-key: one signature is enough; give one of them")
    signed_by = _told(mistakes, lambda: _key(asked.sign_with, asked.gpg_key), None)
    if signers and signed_by is not None and not signed_by.startswith("ssh "):
        mistakes.append(f"{signers} lists who may waive here; sign with one of these keys: --sign-with KEY")
    if mistakes or signed_by is None:
        raise RecipeError(mistakes)
    return WaiverValue(
        name=version.name,
        version=version.label,
        digest=digest,
        gates=keys,
        reason=asked.reason.strip(),
        until=ends,
        by=asked.by or history.whoever(),
        at=moment,
        signed_by=signed_by,
    )


def counting(store: Store, name: str, label: str, now: datetime | None = None) -> list[Waiver]:
    """The waivers of a version that count now: about these bytes, not ended, and signed where that is asked for.

    Raises RecipeError for an unknown version, CompressError for a damaged manifest or allowed_signers.
    """
    return list(_cover(store, name, label, now).counting)


def uncovered(store: Store, name: str, label: str, now: datetime | None = None) -> list[str]:
    """Keys (KIND:MEASURE) of the decisive gates that no counting waiver covers; empty if it passed. Raises as above.

    What `promote` asks: a version with an empty list may be released.
    """
    return _cover(store, name, label, now).open_gates


def why_not(store: Store, waiver: Waiver, now: datetime | None = None) -> str:
    """Why a waiver does not count now; empty if it does. Raises CompressError for a damaged allowed_signers."""
    try:
        found = manifest.read(store.version(waiver.name, waiver.label).path)
    except (RecipeError, ManifestError):
        return "is about a version that is not here or damaged"
    return waivers.covers(waiver, found.digest, waivers.signers_of(store.root), now or datetime.now(UTC))


def _cover(store: Store, name: str, label: str, now: datetime | None) -> Cover:
    version = store.version(name, label)
    found = manifest.read(version.path)
    signers = waivers.signers_of(store.root)
    return cover(store.history(name), version, found, signers, now or datetime.now(UTC))


def _told(mistakes: list[str], ask: Callable[[], T], otherwise: T) -> T:
    """What `ask` gives; its mistakes go to `mistakes`, so that all can be told together."""
    try:
        return ask()
    except RecipeError as error:
        mistakes += error.mistakes
        return otherwise


def _key(sign_with: Path | None, gpg_key: str | None) -> str:
    if sign_with:
        return signing.key_of_ssh(sign_with)
    return signing.key_of_gpg(gpg_key) if gpg_key else ""


def _sign(data: bytes, sign_with: Path | None, signed_by: str) -> str | None:
    if sign_with:
        return signing.sign_ssh(data, sign_with)
    return signing.sign_gpg(data, signed_by) if signed_by else None


def _refuse_unlisted(value: WaiverValue, signature: str | None, signers: Path | None) -> None:
    if signature is None or signers is None:
        return
    checked = signing.check(value.signed_bytes(), signing.Signature(signature, value.signed_by), signers)
    if checked.state != "valid":
        raise RecipeError(f"{value.signed_by}: {checked.sentence} of the store, so its waivers would not count")
