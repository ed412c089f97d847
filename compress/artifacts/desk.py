"""The release desk: promote, roll back, waive. Each is one line of the history, written under the name's lock.

    promote    a version that is whole and passed, or whose failed gates waivers cover, goes into a channel
    roll back  the channel goes back to what it held before, if that is still whole and allowed
    waive      somebody answers for gates that did not pass, with a reason and an end

Bytes are checked before the lock is taken, because hashing takes long and publishers wait; under the lock only the
manifest is looked at again. Waivers are in `waiving.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from compress.artifacts import channels, history, manifest
from compress.artifacts.allowed import counting_waivers, refuse_unrecorded, whole
from compress.artifacts.channels import Channel
from compress.artifacts.history import History
from compress.artifacts.layout import Version
from compress.artifacts.lines import MOVED, Draft, Event, Line
from compress.artifacts.manifest import Manifest
from compress.artifacts.store import Store
from compress.artifacts.waivers import Waiver
from compress.artifacts.waiving import counting, uncovered, waive, why_not
from compress.artifacts.words import not_utf8
from compress.errors import CompressError, RecipeError
from compress.files import disk_errors

__all__ = ["Moved", "counting", "promote", "rollback", "uncovered", "waive", "why_not"]

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
    _check_words(channel, by, note)
    version = store.version(name, label)
    found = whole(version, quick)
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
    _check_words(channel, by, note)
    label = to or _held_before(name, store.history(name), channel)
    version = _still_there(store, name, label, channel)
    found = whole(version, quick)
    with store.locked(name) as past:
        if to is None and _held_before(name, past, channel) != label:
            raise CompressError(f"{name}: {channel} was changed by somebody else just now; look again, then repeat")
        return _move(store, past, version, found, channel, "rolled_back", by, note, quick, now)


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
        refuse_unrecorded(past, version.reference, found, damaged_too=event == "rolled_back")
        moment = now or datetime.now(UTC)
        waived_by = tuple(counting_waivers(store.root, past, version, found, moment))
        channels.path_of(home, channel)  # a link is refused before anything is written
        held = channels.state(home, past, channel)
        before = held.held.version if held.held else None
        if held.held and before == version.label and held.held.digest == found.digest and not held.wrong:
            return Moved(channels.of_line(version.name, held.held), before, False, waived_by)
        line = _line(version, found, channel, event, by, note, quick, before)
        (written,) = history.append(home, past, [line], at=moment)
        return Moved(channels.write(home, written), before, True, waived_by)


def _check_words(channel: str, by: str | None, note: str | None) -> None:
    channels.check_channel(channel)
    if mistakes := not_utf8(("--by", by), ("--note", note)):
        raise RecipeError(mistakes)


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


def _held_before(name: str, past: History, channel: str) -> str:
    history.refuse_damaged(f"{name}: to go back all the same, name the version with --to", past)
    held: list[Line] = list(channels.stack(past, channel))
    if not held:
        raise RecipeError(f"nothing of {name} was ever promoted to {channel}, so there is nothing to go back to")
    current = held[-1].version
    before = [line.version for line in held[:-1] if line.version and line.version != current]
    if not before:
        others = sorted({line.version for line in past.lines if _moved(line, channel) and line.version} - {current})
        if others:
            raise RecipeError(
                f"{channel} of {name} is back at {current}, the first it held; it held {', '.join(others)} after that: "
                "name another with --to"
            )
        raise RecipeError(f"{channel} of {name} never held anything but {current}; name another with --to")
    return before[-1]


def _moved(line: Line, channel: str) -> bool:
    return line.event in MOVED and line.channel == channel


def _still_there(store: Store, name: str, label: str, channel: str) -> Version:
    try:
        return store.version(name, label)
    except RecipeError as error:
        raise RecipeError(f"{error} It cannot come back to {channel}; name another with --to.") from None
