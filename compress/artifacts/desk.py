"""The release desk: promote, roll back, waive. Each is one line of the history, written under the name's lock.

    promote    a version that is whole and passed, or whose failed gates waivers cover, goes into a channel
    roll back  the channel goes back to what it held before, if that is still whole and allowed
    waive      somebody answers for gates that did not pass, with a reason and an end

Bytes are checked before the lock is taken, because hashing takes long and publishers wait; under the lock only the
manifest is looked at again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from compress.artifacts import channels, history, manifest, signing, waivers
from compress.artifacts.allowed import counting_waivers
from compress.artifacts.channels import Channel
from compress.artifacts.history import History
from compress.artifacts.layout import Version
from compress.artifacts.lines import Draft, Event, Line
from compress.artifacts.manifest import Manifest
from compress.artifacts.store import Store
from compress.artifacts.verify import check_sizes, verify
from compress.artifacts.waivers import Waiver, WaiverValue
from compress.errors import CompressError, RecipeError
from compress.files import disk_errors

QUICK = "sizes and manifest checked, bytes not hashed"


@dataclass(frozen=True)
class Moved:
    """A channel after promote or rollback. `before` is the version it held, `changed` false if it holds it already."""

    channel: Channel
    before: str | None
    changed: bool
    waived_by: tuple[Waiver, ...] = ()


def promote(
    store: Store,
    name: str,
    label: str,
    channel: str,
    by: str | None = None,
    note: str | None = None,
    quick: bool = False,
    now: datetime | None = None,
) -> Moved:
    """Put a version into a channel.

    Raises RecipeError for unknown names, CompressError for a version or a history that is damaged, RefusedError when
    gates did not pass and no waiver covers them. `quick` compares sizes instead of hashing, and the history says so.
    """
    channels.check_channel(channel)
    version = store.version(name, label)
    found = _whole(version, quick)
    with store.locked(name) as past:
        history.refuse_damaged(name, past)
        return _move(store, past, version, found, channel, "promoted", by, note, quick, now)


def rollback(
    store: Store,
    name: str,
    channel: str,
    to: str | None = None,
    by: str | None = None,
    note: str | None = None,
    quick: bool = False,
    now: datetime | None = None,
) -> Moved:
    """Let a channel go back to what it held before, or to the version `to`.

    Raises as `promote` does, and RecipeError when the channel never held anything else. With `to` a damaged history
    does not stop it: going back is urgent, and the version named is checked all the same.
    """
    channels.check_channel(channel)
    label = to or _held_before(name, store.history(name), channel)
    version = _still_there(store, name, label, channel)
    found = _whole(version, quick)
    with store.locked(name) as past:
        if to is None and _held_before(name, past, channel) != label:
            raise CompressError(f"{name}: {channel} was changed by somebody else just now; look again, then repeat")
        return _move(store, past, version, found, channel, "rolled_back", by, note, quick, now)


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
    found = _whole(version, quick=False)
    failed = waivers.gates_not_passed(version.path)
    if found.verdict == "passed" and not failed:
        raise RecipeError(f"{version.reference} passed every gate: there is nothing to waive")
    keys = waivers.named_gates(failed, gates)
    ends = waivers.read_until(until, moment)
    if not reason.strip():
        raise RecipeError("--reason: say why; whoever reads this in a year knows nothing else")
    if sign_with and gpg_key:
        raise RecipeError("--sign-with and --gpg-key: one signature is enough; give one of them")
    signers = waivers.signers_of(store.root)
    signed_by = _key(sign_with, gpg_key)
    if signers and not signed_by.startswith("ssh "):
        raise RecipeError(f"{signers} lists who may waive here; sign with one of these keys: --sign-with KEY")
    value = WaiverValue(
        name=name,
        version=version.label,
        digest=found.digest,
        gates=keys,
        reason=reason.strip(),
        until=ends,
        by=by or history.whoever(),
        at=moment,
        signed_by=signed_by,
    )
    signature = _sign(value.signed_bytes(), sign_with, signed_by)
    _refuse_unlisted(value, signature, signers)
    draft = Draft(
        event="waived",
        who=value.by,
        version=version.label,
        digest=found.digest,
        detail=f"{', '.join(keys)} until {ends:%Y-%m-%d}: {value.reason}",
        waiver=value.model_dump(mode="json"),
        signature=signature,
    )
    with store.locked(name) as past:
        line = history.append(store.home(name), past, [draft], at=moment)[0]
    return next(waiver for waiver in store.waivers(name, version.label) if waiver.line == line.seq)


def _move(
    store: Store,
    past: History,
    version: Version,
    found: Manifest,
    channel: str,
    event: Event,
    by: str | None,
    note: str | None,
    quick: bool,
    now: datetime | None,
) -> Moved:
    """Under the lock: the line, then the channel's file."""
    home = store.home(version.name)
    with disk_errors(home):
        if manifest.read(version.path).digest != found.digest:
            raise CompressError(f"{version.path}: was replaced while it was being checked")
        moment = now or datetime.now(UTC)
        counting = counting_waivers(store.root, past, version, found, moment)
        channels.path_of(home, channel)  # a link is refused before anything is written
        held = channels.state(home, past, channel)
        before = held.held.version if held.held else None
        if held.held and before == version.label and held.held.digest == found.digest and not held.wrong:
            return Moved(channels.of_line(version.name, held.held), before, False, tuple(counting))
        line = _line(version, found, channel, event, by, note, quick, before)
        (written,) = history.append(home, past, [line], at=moment)
        return Moved(channels.write(home, written), before, True, tuple(counting))


def _line(
    version: Version,
    found: Manifest,
    channel: str,
    event: Event,
    by: str | None,
    note: str | None,
    quick: bool,
    before: str | None,
) -> Draft:
    return Draft(
        event=event,
        who=by or history.whoever(),
        version=version.label,
        digest=found.digest,
        detail="; ".join([f"{channel} held {before or 'nothing'} before", *([QUICK] if quick else [])]),
        channel=channel,
        note=note or None,
    )


def _whole(version: Version, quick: bool) -> Manifest:
    """The manifest of a version that is as it was published. Raises CompressError naming everything that is not."""
    result = check_sizes(version.path) if quick else verify(version.path)
    if not result.ok:
        raise CompressError("\n".join([f"{version.reference} is damaged and stays where it is:", *result.problems]))
    return manifest.read(version.path)


def _held_before(name: str, past: History, channel: str) -> str:
    history.refuse_damaged(f"{name}: to go back all the same, name the version with --to", past)
    held: list[Line] = list(channels.stack(past, channel))
    if not held:
        raise RecipeError(f"nothing of {name} was ever promoted to {channel}, so there is nothing to go back to")
    before = [line.version for line in held[:-1] if line.version != held[-1].version]
    if not before or before[-1] is None:
        raise RecipeError(f"{channel} of {name} never held anything but {held[-1].version}; name another with --to")
    return before[-1]


def _still_there(store: Store, name: str, label: str, channel: str) -> Version:
    try:
        return store.version(name, label)
    except RecipeError as error:
        raise RecipeError(f"{error} It cannot come back to {channel}; name another with --to.") from None


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
