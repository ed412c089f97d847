"""The store: a folder of numbered artifacts that two processes may publish into at once, and that survives kill -9.

What lies where is drawn in `layout.py`. Why this is safe:

- A folder becomes a version by one rename, after its manifest was written and everything was flushed to disk.
  Before the rename it lies in `.staging`, where nothing looks for artifacts.
- Locks are `flock`: the kernel drops them when their holder dies, however it dies. A process id would not do:
  ids are reused, and mean nothing to another container that shares the store.
- rename(2) does not replace a folder that has something in it, so even a file system whose locks lie cannot lose a
  published version.
- Whoever takes a name's lock first finishes what a dead process began (`recovery.py`).
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from compress.artifacts import channels, layout, manifest, waivers
from compress.artifacts import history as history_
from compress.artifacts.attestation import attach
from compress.artifacts.dedupe import make_read_only, share
from compress.artifacts.history import History
from compress.artifacts.layout import LOCK, NAME_RULE, REJECTED, STAGING, Version, make_folder, refuse_link
from compress.artifacts.lines import Draft, Event, Line
from compress.artifacts.locks import file_lock, read_lock, try_lock
from compress.artifacts.manifest import MANIFEST_NAME, Manifest, Verdict
from compress.artifacts.recovery import made_draft, reconcile
from compress.artifacts.waivers import Waiver
from compress.errors import CompressError, RecipeError, ResourceError, nearest
from compress.files import disk_errors, flush

__all__ = ["NAME_RULE", "Reservation", "Store", "Version", "Waiver", "check_writable"]


@dataclass(frozen=True)
class Reservation:
    """The right to publish the next version of `name`, as long as the block that reserved it runs."""

    store: Store
    name: str
    label: str
    path: Path
    history: History

    def publish(
        self,
        staged: Path,
        verdict: Verdict,
        facts: Mapping[str, Any],
        known: Mapping[Path, manifest.Hashed] | None = None,
    ) -> Path:
        """Write the manifest into `staged`, flush everything, and move it to `path`, which is returned.

        `facts` holds `lineage` (digests by role: source, recipe, calibration), `environment` (JSON values) and, for a
        version made from another one, `parent` (its `reference` and `digest`); `known` is what `manifest.hashed_model`
        read of `staged` before. Files equal to published ones become
        links to them; all become read-only. Raises ValueError when the verdict does not fit the reserved kind of
        number, ManifestError when `staged` holds a link, ResourceError when the disk is full.
        """
        if (verdict == "passed") == self.label.startswith("r"):
            raise ValueError(f"{self.label} was reserved, which does not fit the verdict {verdict}")
        if not staged.resolve().is_relative_to(self.store.root):
            raise ValueError(f"{staged} is not inside the store {self.store.root}: stage with Store.staging")
        with disk_errors(self.path):
            moment = datetime.now(UTC)
            files = attach(staged, manifest.hash_files(staged, known), f"{self.name}@{self.label}", facts, moment)
            made = manifest.build(
                staged,
                name=self.name,
                version=self.label,
                verdict=verdict,
                lineage=facts.get("lineage", {}),
                environment=facts.get("environment", {}),
                parent=facts.get("parent"),
                history=self.history.pin,
                created=moment,
                files=files,
            )
            share(self.store.root, staged, files)
            (staged / MANIFEST_NAME).unlink(missing_ok=True)  # copied from another version, it is read-only
            (staged / MANIFEST_NAME).write_text(manifest.to_text(made), encoding="utf-8")
            seal(staged)
            os.rename(staged, self.path)
            flush(self.path.parent, recurse=False)
        self._record(made)
        return self.path

    def _record(self, made: Manifest) -> None:
        """The line comes after the rename: without it the version is whole, and the next to take the lock writes it."""
        try:
            history_.append(self.store.root / self.name, self.history, [made_draft(made)])
        except ResourceError as error:
            raise ResourceError(
                f"{self.path} is published and whole, but its line in the history could not be written: {error}. "
                "The next command that changes this name writes it."
            ) from error


def seal(staged: Path) -> None:
    """Make a staged artifact ready for the rename: read-only, and on the disk."""
    make_read_only(staged)
    flush(staged)


class Store:
    """A folder of artifacts. Making the object touches nothing on disk; `root` need not exist yet."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root).expanduser().resolve()

    # --- writing ---------------------------------------------------------------------------------------------------

    @contextmanager
    def staging(self, name: str) -> Iterator[Path]:
        """Give an empty folder inside the store. What is still there when the block ends is removed.

        Also removes what dead processes left behind. Raises RecipeError for a bad name, and ResourceError for a store
        that cannot be written or a disk that fills up while the block writes.
        """
        self.home(name)
        with disk_errors(self.root):
            self.sweep()
            with self.claimed(f"{name}-{os.getpid()}") as folder:
                yield folder

    @contextmanager
    def claimed(self, prefix: str) -> Iterator[Path]:
        """An empty folder in `.staging` beside a lock that says its writer lives; both are gone afterwards."""
        area = self.staging_area()
        folder = area / f"{prefix}-{secrets.token_hex(8)}"
        lock = area / f"{folder.name}.lock"
        with file_lock(lock):
            folder.mkdir()
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
                if not folder.exists():
                    lock.unlink(missing_ok=True)

    def staging_area(self) -> Path:
        area = self.root / STAGING
        refuse_link(area)
        make_folder(area)
        return area

    @contextmanager
    def locked(self, name: str) -> Iterator[History]:
        """Hold the name's lock, with what dead processes began brought to an end. Gives the history as it is now."""
        home = self.home(name)
        with disk_errors(home):
            make_folder(home)
            for name_of_file in (LOCK, history_.HISTORY_NAME, history_.HEAD_NAME):
                refuse_link(home / name_of_file)
            with file_lock(home / LOCK):
                yield reconcile(home)

    @contextmanager
    def reserve(self, name: str, rejected: bool) -> Iterator[Reservation]:
        """Hold the name's lock and tell which number comes next, so that a report can name its own version.

            with store.staging(name) as staged:
                ...                                               # model/, recipe.yaml: the long part, without the lock
                with store.reserve(name, rejected=False) as slot:
                    write_report(report_naming(slot.label, slot.path), staged / "reports")
                    slot.publish(staged, "passed", facts)

        Holding a lock is simpler than a reserved number that somebody must hand back: whatever ends this block,
        kill -9 included, frees the lock, and a number that was not published is given out again. Others who publish
        under the same name wait. The next number is one above the highest there ever was, whatever became of it.
        """
        home = self.home(name)
        with self.locked(name) as history:
            parent = home / REJECTED if rejected else home
            if rejected:
                refuse_link(parent)
                make_folder(parent)
            number = max(layout.highest(parent, rejected), history.highest(rejected)) + 1
            label = f"{'r' if rejected else 'v'}{number:04d}"
            yield Reservation(self, name, label, parent / label, history)

    def publish(self, staged: Path, name: str, verdict: Verdict, facts: Mapping[str, Any]) -> Path:
        """Reserve the next number and publish `staged` under it: `Reservation.publish` says the rest."""
        with self.reserve(name, rejected=verdict != "passed") as slot:
            return slot.publish(staged, verdict, facts)

    def predict_next_version(self, name: str, rejected: bool = False) -> str:
        """The label the next publish would get, for plans. Only `reserve` makes it sure."""
        home = self.home(name)
        there = layout.highest(home / REJECTED if rejected else home, rejected)
        return f"{'r' if rejected else 'v'}{max(there, history_.read(home).highest(rejected)) + 1:04d}"

    def record(self, name: str, event: Event, label: str, digest: str, detail: str = "", by: str | None = None) -> Line:
        """Add a line to the history of `name` about something that happened to a version: pushed, exported.

        Not inside a `reserve` block of the same name, which holds the lock that this waits for.
        """
        draft = Draft(event=event, who=by or history_.whoever(), version=label, digest=digest, detail=detail)
        with self.locked(name) as history:
            return history_.append(self.home(name), history, [draft])[0]

    def sweep(self) -> list[str]:
        """Remove staging folders whose process is dead; returns their names. Living ones are left alone."""
        swept: list[str] = []
        area = self.root / STAGING
        for lock in sorted(area.glob("*.lock")):
            with try_lock(lock) as ours:
                if ours:
                    folder = lock.with_suffix("")
                    if folder.exists():
                        swept.append(folder.name)
                        shutil.rmtree(folder, ignore_errors=True)
                    # The lock file goes last: a folder without one would never be swept.
                    if not folder.exists():
                        lock.unlink(missing_ok=True)
        return swept

    # --- reading ---------------------------------------------------------------------------------------------------

    def names(self) -> list[str]:
        """Every name with a published version or a rejected run, sorted."""
        named = (name for name in layout.entries(self.root) if NAME_RULE.fullmatch(name))
        return sorted(name for name in named if any(True for _ in layout.versions_in(self.root / name)))

    def versions(self, name: str) -> list[Version]:
        """Published versions, then rejected runs, each in the order of their numbers. Empty for an unknown name."""
        return list(layout.versions_in(self.home(name)))

    def version(self, name: str, label: str) -> Version:
        """One version by name and label (v3 is v0003). Raises RecipeError with the nearest known one."""
        versions = self.versions(name)
        if not versions:
            raise RecipeError(f'There is no "{name}" in the store {self.root}.{nearest(name, self.names())}')
        return layout.choose(versions, name, label)

    def history(self, name: str) -> History:
        """What happened to `name`, read without its lock."""
        return history_.read(self.home(name))

    def promoted(self, name: str, channel: str) -> Version | None:
        """What `channel` (staging, production) of `name` holds; None if nothing was ever promoted there.

        Raises CompressError when the channel's file is damaged or its version is gone, RecipeError for an unknown
        channel or a link.
        """
        held = channels.read(self.home(name), channel)
        return None if held is None else self.version(name, held.version)

    def waivers(self, name: str, label: str) -> list[Waiver]:
        """Every waiver ever given to a version, expired ones too, in order. Raises RecipeError for a bad name."""
        return waivers.of_history(self.history(name), layout.whole_label(label) or label)

    def find(self, reference: str) -> Path:
        """The folder of NAME (its newest published version), NAME@v0003, NAME@r0001, NAME@production, or of a path.

        A path (it has a slash, or is absolute) may lie anywhere: it is only read. Raises RecipeError with the nearest
        known name or version when there is none, CompressError when a channel is not what the history says.
        """
        if "/" in reference or os.sep in reference:
            return _artifact_at(Path(reference))
        name, _, label = reference.partition("@")
        versions = self.versions(name)
        if not versions:
            raise RecipeError(f'There is no "{name}" in the store {self.root}.{nearest(name, self.names())}')
        if label in channels.CHANNELS:
            held, wrong = self.holding(name, label)
            if held is None or wrong:
                raise CompressError(
                    f"{name}/{wrong}. `compress verify {name}@{label}` tells more; to use a version all the same, name "
                    f"it by its number, as {versions[0].reference}"
                )
            return held.path
        if label:
            return layout.choose(versions, name, label).path
        published = [version for version in versions if not version.rejected]
        if not published:
            raise RecipeError(
                f'No version of "{name}" has passed its gates. The newest rejected run is {versions[-1].reference}.'
            )
        return published[-1].path

    def holding(self, name: str, channel: str) -> tuple[Version | None, str]:
        """What a channel holds, and what is wrong with it by the history: its file, or the version's digest.

        Empty words: nothing is wrong. No version, and words: its file leads to none. Raises RecipeError where nothing
        was ever promoted there.
        """
        home = self.home(name)
        with read_lock(home / LOCK):
            state = channels.state(home, history_.read(home), channel)
            wrong = "" if state.interrupted else state.wrong
            try:
                held = self.promoted(name, channel)
            except CompressError as error:
                return None, wrong or f"{channels.FOLDER}/{channel}.json: {error}"
            if held is None and state.interrupted:
                raise RecipeError(f"{name}/{state.wrong}, and nothing was promoted to {channel} before; promote again")
            if held is None and not wrong:
                raise RecipeError(f'Nothing of "{name}" was ever promoted to {channel}; `compress promote` does.')
            if held is not None and not wrong:
                wrong = channels.other_bytes(state, channel, manifest.read(held.path))
        return held, wrong

    def home(self, name: str) -> Path:
        """The folder of a name, which need not exist. Raises RecipeError for a bad name or a link."""
        layout.check_name(name)
        folder = self.root / name
        refuse_link(folder)
        return folder


def check_writable(root: Path, needed_bytes: int = 0) -> None:
    """Prove that the store can be written, before hours of work depend on it; makes `root` if it is missing.

    `needed_bytes` is what the run is expected to write. Raises ResourceError naming the path and a remedy.
    """
    root = Path(root).expanduser().resolve()
    with disk_errors(root):
        make_folder(root / STAGING)
        probe = root / STAGING / f"probe-{secrets.token_hex(8)}"
        try:
            with probe.open("wb") as stream:
                stream.write(bytes(4096))
                stream.flush()
                os.fsync(stream.fileno())
        finally:
            probe.unlink(missing_ok=True)
        free = shutil.disk_usage(root).free
    if free < needed_bytes:
        raise ResourceError(
            f"{root}: {needed_bytes:,} bytes are needed and {free:,} are free; "
            "free some space or choose a store on another disk"
        )


def _artifact_at(path: Path) -> Path:
    if (path / MANIFEST_NAME).is_file():
        return path.resolve()
    raise RecipeError(f"{path}: no artifact there (a folder with a {MANIFEST_NAME}); name one as NAME or NAME@v0001")
