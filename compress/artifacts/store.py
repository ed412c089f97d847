"""The store: a folder of numbered artifacts that two processes may publish into at once, and that survives kill -9.

    <store>/<name>/v0001/            published: every gate passed
    <store>/<name>/rejected/r0001/   kept, but a gate failed or was inconclusive
    <store>/<name>/.lock             held while a number is given out and the folder moved into place
    <store>/.staging/<name>-<pid>-<random>/       an artifact being written, on the same file system
    <store>/.staging/<name>-<pid>-<random>.lock   held as long as the process that writes it lives

Why this is safe:

- A folder becomes a version by one rename, after its manifest was written and everything was flushed to disk.
  Before the rename it lies in `.staging`, where nothing looks for artifacts.
- Both locks are `flock`: the kernel drops them when their holder dies, however it dies. A process id would not do:
  ids are reused, and mean nothing to another container that shares the store.
- rename(2) does not replace a folder that has something in it, so even a file system whose locks lie cannot lose a
  published version.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.artifacts import manifest
from compress.artifacts.locks import file_lock, try_lock
from compress.artifacts.manifest import MANIFEST_NAME, Verdict
from compress.errors import RecipeError, ResourceError, nearest
from compress.files import disk_errors, flush

NAME_RULE = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_LABEL = re.compile(r"([vr])([0-9]{1,9})")
_STAGING = ".staging"
_REJECTED = "rejected"


@dataclass(frozen=True)
class Version:
    """One artifact of the store. `label` is v0003, or r0001 for a rejected run."""

    name: str
    label: str
    path: Path

    @property
    def rejected(self) -> bool:
        return self.label.startswith("r")

    @property
    def reference(self) -> str:
        """What `find` takes: NAME@v0003."""
        return f"{self.name}@{self.label}"


@dataclass(frozen=True)
class Reservation:
    """The right to publish the next version of `name`, as long as the block that reserved it runs."""

    store: Store
    name: str
    label: str
    path: Path

    def publish(self, staged: Path, verdict: Verdict, facts: Mapping[str, Any]) -> Path:
        """Write the manifest into `staged`, flush everything, and move it to `path`, which is returned.

        `facts` holds `lineage` (digests by role: source, recipe, calibration) and `environment` (JSON values).
        Raises ValueError when the verdict does not fit the reserved kind of number, ManifestError when `staged` holds
        a link, ResourceError when the disk is full.
        """
        if (verdict == "passed") == self.label.startswith("r"):
            raise ValueError(f"{self.label} was reserved, which does not fit the verdict {verdict}")
        if not staged.resolve().is_relative_to(self.store.root):
            raise ValueError(f"{staged} is not inside the store {self.store.root}: stage with Store.staging")
        with disk_errors(self.path):
            made = manifest.build(
                staged,
                name=self.name,
                version=self.label,
                verdict=verdict,
                lineage=facts.get("lineage", {}),
                environment=facts.get("environment", {}),
            )
            (staged / MANIFEST_NAME).write_text(manifest.to_text(made), encoding="utf-8")
            flush(staged)
            os.rename(staged, self.path)
            flush(self.path.parent, recurse=False)
        return self.path


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
        self._folder(name)
        with disk_errors(self.root):
            area = self.root / _STAGING
            _refuse_link(area)
            _make(area)
            self.sweep()
            with _claimed(area, f"{name}-{os.getpid()}") as folder:
                yield folder

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
        under the same name wait. The next number is one above the highest there, whatever state that one is in.
        """
        home = self._folder(name)
        with disk_errors(home):
            _make(home)
            with file_lock(home / ".lock"):
                parent = home / _REJECTED if rejected else home
                if rejected:
                    _refuse_link(parent)
                    _make(parent)
                label = f"{'r' if rejected else 'v'}{_highest(parent, rejected) + 1:04d}"
                yield Reservation(self, name, label, parent / label)

    def publish(self, staged: Path, name: str, verdict: Verdict, facts: Mapping[str, Any]) -> Path:
        """Reserve the next number and publish `staged` under it: `Reservation.publish` says the rest."""
        with self.reserve(name, rejected=verdict != "passed") as slot:
            return slot.publish(staged, verdict, facts)

    def predict_next_version(self, name: str, rejected: bool = False) -> str:
        """The label the next publish would get, for plans. Only `reserve` makes it sure."""
        home = self._folder(name)
        return f"{'r' if rejected else 'v'}{_highest(home / _REJECTED if rejected else home, rejected) + 1:04d}"

    def sweep(self) -> list[str]:
        """Remove staging folders whose process is dead; returns their names. Living ones are left alone."""
        swept: list[str] = []
        area = self.root / _STAGING
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
        return sorted(name for name in _entries(self.root) if NAME_RULE.fullmatch(name) and self.versions(name))

    def versions(self, name: str) -> list[Version]:
        """Published versions, then rejected runs, each in the order of their numbers. Empty for an unknown name."""
        home = self._folder(name)
        found: list[Version] = []
        for parent, rejected in ((home, False), (home / _REJECTED, True)):
            if not parent.is_symlink():
                numbered = sorted((number, label) for label, number in _numbered(parent, rejected))
                found += [Version(name, label, parent / label) for _, label in numbered]
        return [version for version in found if (version.path / MANIFEST_NAME).is_file()]

    def promoted(self, name: str, channel: str) -> Version | None:
        """The version that `channel` of `name` leads to: <store>/<name>/channels/<channel>.json names it. None where
        nothing was promoted, and where what was is not there any more."""
        try:
            text = (self._folder(name) / "channels" / f"{channel}.json").read_text(encoding="utf-8")
            label = json.loads(text)["version"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return next((version for version in self.versions(name) if version.label == label), None)

    def find(self, reference: str) -> Path:
        """The folder of NAME (its newest published version), NAME@v0003, NAME@r0001, or of a path to an artifact.

        A path (it has a slash, or is absolute) may lie anywhere: it is only read. Raises RecipeError with the nearest
        known name or version when there is none.
        """
        if "/" in reference or os.sep in reference:
            return _artifact_at(Path(reference))
        name, _, label = reference.partition("@")
        versions = self.versions(name)
        if not versions:
            raise RecipeError(f'There is no "{name}" in the store {self.root}.{nearest(name, self.names())}')
        if label:
            return _choose(versions, name, label).path
        published = [version for version in versions if not version.rejected]
        if not published:
            raise RecipeError(
                f'No version of "{name}" has passed its gates. The newest rejected run is {versions[-1].reference}.'
            )
        return published[-1].path

    def _folder(self, name: str) -> Path:
        if not NAME_RULE.fullmatch(name):
            raise RecipeError(
                f"{name!r} cannot name an artifact: use at most 64 of a-z, 0-9, dot, underscore and hyphen, "
                "beginning with a letter or digit, so that it stays one folder inside the store"
            )
        folder = self.root / name
        _refuse_link(folder)
        return folder


def check_writable(root: Path, needed_bytes: int = 0) -> None:
    """Prove that the store can be written, before hours of work depend on it; makes `root` if it is missing.

    `needed_bytes` is what the run is expected to write. Raises ResourceError naming the path and a remedy.
    """
    root = Path(root).expanduser().resolve()
    with disk_errors(root):
        _make(root / _STAGING)
        probe = root / _STAGING / f"probe-{secrets.token_hex(8)}"
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


@contextmanager
def _claimed(area: Path, prefix: str) -> Iterator[Path]:
    """An empty folder in `area` beside a lock that says its writer lives; both are gone afterwards."""
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


def _entries(folder: Path) -> list[str]:
    """Names of the true folders in `folder`; links are never followed."""
    try:
        with os.scandir(folder) as entries:
            return [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    except (FileNotFoundError, NotADirectoryError):
        return []


def _numbered(parent: Path, rejected: bool) -> Iterator[tuple[str, int]]:
    for name in _entries(parent):
        matched = _LABEL.fullmatch(name)
        if matched and (matched[1] == "r") == rejected and name == f"{matched[1]}{int(matched[2]):04d}":
            yield name, int(matched[2])


def _highest(parent: Path, rejected: bool) -> int:
    return max((number for _, number in _numbered(parent, rejected)), default=0)


def _choose(versions: list[Version], name: str, label: str) -> Version:
    matched = _LABEL.fullmatch(label)
    wanted = f"{matched[1]}{int(matched[2]):04d}" if matched else label
    for version in versions:
        if version.label == wanted:
            return version
    guess = nearest(label, [version.label for version in versions])
    raise RecipeError(f'"{name}" has no version "{label}"; the newest is {versions[-1].label}.{guess}')


def _artifact_at(path: Path) -> Path:
    if (path / MANIFEST_NAME).is_file():
        return path.resolve()
    raise RecipeError(f"{path}: no artifact there (a folder with a {MANIFEST_NAME}); name one as NAME or NAME@v0001")


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ResourceError(f"{folder}: a file is where a folder should be; choose another store") from None


def _refuse_link(folder: Path) -> None:
    if folder.is_symlink():
        raise RecipeError(f"{folder} is a link and could lead outside the store; replace it by a folder")
