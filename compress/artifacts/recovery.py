"""What a crash left between two steps is brought to an end by whoever takes the name's lock next.

    what was under way                            what is there                    what is done
    publish: rename, then line                    a version without a line         the line, marked as recovered
    promote, roll back: line, then channel file   a last line not carried out      `abandoned`: the channel stays
    collect, pull: line, then rename              a last line not carried out      `abandoned`: as if never begun
    any: a line written to half (power loss)      bytes after the last newline     cut off, `repaired`
    any: a file written beside its place          a dot file ending in .tmp        removed

A head, a channel or a manifest that contradicts the lines is no crash: a line `broken` keeps what it said, before any
command can write over it, and promotions are refused. One about a channel's file alone holds until somebody sets that
channel by `rollback --to`; one about a version of which no line tells, until that is taken away; all others for ever.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from compress.artifacts import channels, manifest
from compress.artifacts.history import History, append, cut_torn, read, whoever
from compress.artifacts.layout import Version, place_of, relative_path, versions_in
from compress.artifacts.lines import MOVED, Draft, Line
from compress.artifacts.manifest import MANIFEST_NAME, Manifest, ManifestError, Pin


def reconcile(home: Path) -> History:
    """Finish what a dead process began; under the name's lock, before anything else. Returns the history."""
    for folder in (home, home / channels.FOLDER):
        for leftover in folder.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)
    history = read(home)
    broken = [draft for draft in _contradictions(home, history) if not history.has_broken(draft)]
    drafts = [*_abandoned(home, history), *_repaired(history), *broken, *_unrecorded(home, history)]
    if history.torn_at is not None:
        cut_torn(home, history)
    if drafts:
        append(home, history, drafts)
        history = read(home)
    return history


def pending(home: Path, history: History) -> Line | None:
    """The last line, if a crash kept it from being carried out."""
    line = history.lines[-1] if history.lines else None
    if line is None or line.version is None:
        return None
    there = (home.parent / relative_path(home.name, line.version) / MANIFEST_NAME).is_file()
    if line.event in MOVED and line.channel in channels.CHANNELS:
        return line if channels.state(home, history, line.channel).interrupted else None
    return line if (line.event == "collected" and there) or (line.event == "pulled" and not there) else None


def unrecorded(home: Path, history: History) -> Iterator[tuple[Version, Manifest, str]]:
    """Versions that no line tells of, with how their manifest contradicts the history (empty if it does not)."""
    made = history.made()
    skipped = pending(home, history)
    for version in versions_in(home):
        if version.label in made or (skipped and skipped.version == version.label):
            continue
        try:
            found = manifest.read(version.path)
        except ManifestError:
            continue  # `verify` names it
        yield version, found, history.contradicts(found.history) if found.history else ""


def made_draft(found: Manifest, detail: str = "", recovered: bool | None = None) -> Draft:
    """The line that tells of a version published here."""
    return Draft(
        event="published" if found.verdict == "passed" else "rejected",
        who=whoever(),
        version=found.version,
        digest=found.digest,
        detail=detail or (f"made from {found.parent.reference}" if found.parent else ""),
        parent=found.parent,
        recovered=recovered,
    )


def _abandoned(home: Path, history: History) -> Iterator[Draft]:
    if line := pending(home, history):
        yield Draft(
            event="abandoned",
            who=whoever(),
            version=line.version,
            digest=line.digest,
            channel=line.channel,
            undoes=line.seq,
            detail=f"line {line.seq} ({line.event}) was not carried out: a crash came first",
            recovered=True,
        )


def _repaired(history: History) -> Iterator[Draft]:
    if history.torn_at is not None:
        detail = "the last line had been written to half and was cut off"
        yield Draft(event="repaired", who=whoever(), detail=detail, recovered=True)


def _contradictions(home: Path, history: History) -> Iterator[Draft]:
    """What head, channels and manifests say against the lines. The words stay the same as the history grows."""
    if history.lost:
        yield _broken(history.lost)
    for channel in channels.CHANNELS:
        state = channels.state(home, history, channel)
        if not state.wrong or state.interrupted or channels.is_link(home, channel):
            continue
        pin = channels.remembered(home, channel)
        if pin and history.contradicts(pin):
            yield _broken(f"{channels.FOLDER}/{channel}.json remembers line {pin.seq}, which is not in this history")
        else:
            yield _broken(state.wrong, channel=channel)
    # The newest is enough: its manifest remembers the line before it, and with that all others.
    if (newest := _newest_pin(home, history)) and history.contradicts(newest[1]):
        yield _broken(f"{newest[0]}/{MANIFEST_NAME} remembers line {newest[1].seq}, which is not in this history")
    for version, found, contradiction in unrecorded(home, history):
        if contradiction and found.history:
            where = f"{place_of(version.label)}/{MANIFEST_NAME}"
            detail = (
                f"{where} remembers line {found.history.seq}, which is not in this history, and no line tells of it"
            )
            yield _broken(detail, version=version.label)


def _broken(detail: str, channel: str | None = None, version: str | None = None) -> Draft:
    return Draft(event="broken", who=whoever(), detail=detail, channel=channel, version=version, recovered=True)


def _newest_pin(home: Path, history: History) -> tuple[str, Pin] | None:
    lines = [line for line in history.made().values() if line.event != "pulled" and line.version]
    for line in sorted(lines, key=lambda line: -line.seq)[:1]:
        place = place_of(line.version or "")
        try:
            found = manifest.read(home / place)
        except ManifestError:
            return None  # `verify` names it
        if found.history and found.digest == line.digest:
            return place, found.history
    return None


def _unrecorded(home: Path, history: History) -> Iterator[Draft]:
    for version, found, contradiction in unrecorded(home, history):
        if found.version == version.label and found.name == home.name and not contradiction:
            yield made_draft(found, "written after a crash, or for a store older than its history", recovered=True)
