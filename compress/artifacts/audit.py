"""`verify --all`: every version, every history, every channel, every signature of a store.

Only reads. What a crash left between two steps is a note, not a problem: the next to take the lock finishes it. Bytes
are hashed without a lock, since that takes long; a version that was collected meanwhile is no problem either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from compress.artifacts import channels, history, layout, manifest, waivers
from compress.artifacts.allowed import cover
from compress.artifacts.history import History
from compress.artifacts.layout import LOCK, NAME_RULE, REJECTED, Version
from compress.artifacts.locks import read_lock
from compress.artifacts.manifest import MANIFEST_NAME, Manifest, ManifestError
from compress.artifacts.recovery import pending, unrecorded
from compress.artifacts.store import Store
from compress.artifacts.verify import VerifyResult, verify
from compress.errors import CompressError, EnvironmentLacksError


@dataclass(frozen=True)
class Audit:
    """What was looked at. Each problem and note begins with the place it is about, relative to the store."""

    root: Path
    names: int
    versions: tuple[VerifyResult, ...]
    problems: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.problems


def audit(store: Store, progress: Callable[[str], None] = lambda text: None, now: datetime | None = None) -> Audit:
    """Check a whole store. Never raises for what it finds."""
    problems: list[str] = []
    notes: list[str] = []
    results: list[VerifyResult] = []
    moment = now or datetime.now(UTC)
    signers = _signers(store.root, problems)
    names = sorted(name for name in layout.entries(store.root) if NAME_RULE.fullmatch(name))
    problems += [f"{name}: a link; what lies elsewhere is not part of the store" for name in _links(store.root)]
    for name in names:
        home = store.root / name
        with read_lock(home / LOCK):
            past = history.read(home)
            versions = list(layout.versions_in(home))
            about, remarks = _check_name(home, past, versions, signers, moment)
        problems += [f"{name}/{text}" for text in about]
        notes += [f"{name}/{text}" for text in remarks]
        for version in versions:
            progress(f"{version.reference}")
            result = verify(version.path)
            if result.ok or version.path.is_dir():
                results.append(result)
                place = layout.relative_path(name, version.label)
                problems += [f"{place}/{_within(problem, version.path)}" for problem in result.problems]
    return Audit(store.root, len(names), tuple(results), tuple(problems), tuple(notes))


def _check_name(
    home: Path, past: History, versions: list[Version], signers: Path | None, now: datetime
) -> tuple[list[str], list[str]]:
    problems = [*past.problems, *_folders(home, versions), *channels.strangers(home), *waivers.unread(past)]
    notes = [f"{text} (settled since)" for text in past.settled]
    if past.torn_at is not None:
        notes.append(f"{history.HISTORY_NAME}: its last line was written to half; the next command cuts it off")
    if line := pending(home, past):
        notes.append(f"{history.HISTORY_NAME}: line {line.seq} ({line.event}) was not carried out: a crash came first")
    problems += _recorded(home, past, versions)
    for version, found, contradiction in unrecorded(home, past):
        place = layout.place_of(version.label)
        if contradiction:
            remedy = "lines were removed, or it was copied here by hand (`compress pull` brings versions)"
            problems.append(
                f"{place}: no line tells of it, and of what its manifest remembers {contradiction}; {remedy}"
            )
        elif found.version == version.label:
            notes.append(f"{place}: no line of the history tells of it yet; the next command that publishes adds one")
    for channel in channels.CHANNELS:
        state = channels.state(home, past, channel)
        if state.wrong and not state.interrupted:
            problems.append(state.wrong)
        elif state.held:
            about, remarks = _holding(home, past, channel, signers, now)
            problems += about
            notes += remarks
    about, remarks = _signatures(past, signers)
    return problems + about, notes + remarks


def audit_channel(store: Store, name: str, channel: str) -> VerifyResult:
    """What a channel holds: is its file what the history says, and the version the one that was promoted, and whole?

    Raises RecipeError where nothing was ever promoted there.
    """
    held, wrong = store.holding(name, channel)
    if held is None:
        return VerifyResult(store.home(name) / channels.FOLDER / f"{channel}.json", (wrong,), 0, 0, 0)
    result = verify(held.path)
    return replace(result, problems=(*([wrong] if wrong else []), *result.problems))


def _recorded(home: Path, past: History, versions: list[Version]) -> Iterator[str]:
    """What the history says was made must be there, with the digest it had."""
    there = {version.label: version for version in versions}
    skipped = pending(home, past)
    for label, line in past.made().items():
        place = layout.place_of(label)
        if label not in there:
            if not (skipped and skipped.version == label):
                yield f"{place}: line {line.seq} of the history says {line.event}, but it is gone"
            continue
        found = _manifest(there[label])
        if found is None:
            continue  # `verify` names it
        if found.digest != line.digest:
            yield f"{place}: is not the version of line {line.seq} of the history: its manifest has another digest"
        if found.name != home.name:
            yield f"{place}/{MANIFEST_NAME}: says it is {found.name}, but lies under {home.name}"
        if found.history and line.event != "pulled" and (wrong := past.contradicts(found.history)):
            yield f"{place}/{MANIFEST_NAME}: remembers a history of which {wrong}"


def _folders(home: Path, versions: list[Version]) -> Iterator[str]:
    """Numbered folders that are no versions: a rename brings a folder with its manifest, or none."""
    known = {version.label for version in versions}
    if (home / REJECTED).is_symlink():
        yield f"{REJECTED}: a link; what lies elsewhere is not part of the store"
        return
    for parent, rejected in ((home, False), (home / REJECTED, True)):
        for label, _ in layout.numbered(parent, rejected):
            if label not in known:
                yield f"{layout.place_of(label)}: a folder without {MANIFEST_NAME}"


def _holding(
    home: Path, past: History, channel: str, signers: Path | None, now: datetime
) -> tuple[list[str], list[str]]:
    """Is what a channel holds there, the same bytes, and still allowed?"""
    line = channels.stack(past, channel)[-1]
    where = f"{channels.FOLDER}/{channel}.json"
    path = home.parent / layout.relative_path(home.name, line.version or "")
    try:
        found = manifest.read(path)
    except ManifestError:
        return [f"{where}: holds {line.version}, which is not there or damaged"], []
    if found.digest != line.digest:
        return [f"{where}: holds {line.version} with another digest than is there"], []
    try:
        open_gates = cover(past, Version(home.name, line.version or "", path), found, signers, now).open_gates
    except CompressError as error:
        return [f"{where}: holds {line.version}, of which it cannot be told which gates failed: {error}"], []
    if open_gates:
        remark = f"{where}: holds {line.version}, whose verdict is {found.verdict} and whose waivers count no more for"
        return [], [f"{remark} {', '.join(open_gates)}"]
    return [], []


def _signatures(past: History, signers: Path | None) -> tuple[list[str], list[str]]:
    problems: list[str] = []
    notes: list[str] = []
    for waiver in waivers.of_history(past):
        where = f"{history.HISTORY_NAME}: line {waiver.line}: the waiver of {waiver.label} by {waiver.who}"
        try:
            checked = waivers.check_signature(waiver, signers)
        except EnvironmentLacksError as error:
            notes.append(f"{where}: signature not checked: {error}")
            continue
        if checked is None:
            notes.append(f"{where}: not signed")
        elif checked.state == "bad":
            problems.append(f"{where}: {checked.sentence}")
        else:
            notes.append(f"{where}: {checked.sentence}")
    return problems, notes


def _signers(root: Path, problems: list[str]) -> Path | None:
    try:
        return waivers.signers_of(root)
    except CompressError as error:
        problems.append(str(error))
        return None


def _links(root: Path) -> list[str]:
    try:
        return sorted(path.name for path in root.iterdir() if path.is_symlink() and NAME_RULE.fullmatch(path.name))
    except (FileNotFoundError, NotADirectoryError):
        return []


def _manifest(version: Version) -> Manifest | None:
    try:
        return manifest.read(version.path)
    except ManifestError:
        return None


def _within(problem: str, folder: Path) -> str:
    """Problems of the manifest begin with its whole path."""
    return problem.removeprefix(f"{folder}/")
