"""What a crash left between two steps is brought to an end by whoever takes the name's lock next.

    what was under way                            what is there                    what is done
    publish: rename, then line                    a version without a line         the line, marked as recovered
    promote, roll back: line, then channel file   a last line not carried out      `abandoned`: the channel stays
    collect, pull: line, then rename              a last line not carried out      `abandoned`: as if never begun
    any: a line written to half (power loss)      bytes after the last newline     cut off, `repaired`
    any: a file written beside its place          a dot file ending in .tmp        removed

A head that contradicts the lines is no crash: the line `broken` keeps what it said, and `verify` reports it for ever.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from compress.artifacts import channels, manifest
from compress.artifacts.history import History, append, cut_torn, read, whoever
from compress.artifacts.layout import Version, relative_path, versions_in
from compress.artifacts.lines import MOVED, Draft, Line
from compress.artifacts.manifest import MANIFEST_NAME, Manifest, ManifestError


def reconcile(home: Path) -> History:
    """Finish what a dead process began; under the name's lock, before anything else. Returns the history."""
    for folder in (home, home / channels.FOLDER):
        for leftover in folder.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)
    history = read(home)
    drafts = [*_abandoned(home, history), *_repaired(history), *_unrecorded(home, history)]
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
    if history.lost:
        yield Draft(event="broken", who=whoever(), detail=history.lost, recovered=True)


def _unrecorded(home: Path, history: History) -> Iterator[Draft]:
    for version, found, contradiction in unrecorded(home, history):
        if found.version == version.label and found.name == home.name and not contradiction:
            yield made_draft(found, "written after a crash, or for a store older than its history", recovered=True)
