"""Push a version to a URL, pull one from there. Checked before and after, resumable, and never over other bytes.

    push    verify here -> each file that is not there with these bytes -> read back -> manifest last -> `pushed`
    pull    manifest -> each file into `.staging/pull-...`, hashed on the way -> verify -> line `pulled` -> rename

What a killed push has uploaded is found again by its bytes. What a killed pull has fetched stays in `.staging` under a
name that follows from the version's digest, with a lock of its own, and the next pull of that version goes on there.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from compress.artifacts import channels, history, layout, manifest, remote
from compress.artifacts.allowed import refuse_unrecorded
from compress.artifacts.dedupe import share
from compress.artifacts.history import History
from compress.artifacts.layout import Version
from compress.artifacts.lines import MADE, Draft
from compress.artifacts.locks import file_lock, try_lock
from compress.artifacts.manifest import MANIFEST_NAME, FileEntry, Manifest, hash_file
from compress.artifacts.remote import Remote
from compress.artifacts.store import Store, check_writable, seal
from compress.artifacts.verify import label_problems, verify
from compress.artifacts.words import not_utf8, visible_row
from compress.errors import CompressError, RecipeError
from compress.files import disk_errors, flush

Told = Callable[[str], None]


@dataclass(frozen=True)
class Moved:
    """What a push or pull did. `skipped` files were there already; `bytes` are those of the files that were not."""

    version: Version
    digest: str
    url: str
    copied: int
    skipped: int
    bytes: int


def push(store: Store, reference: str, url: str, by: str | None = None, told: Told = lambda text: None) -> Moved:
    """Copy a version of the store to a URL.

    What is missing or damaged there of this very version is written again. Raises RecipeError when another version has
    that place, CompressError when the version is damaged or does not read
    back as it was written, EnvironmentLacksError when a package for the URL is missing.
    """
    if "/" in reference:
        raise RecipeError(f"{reference}: versions of the store are pushed; name one as NAME@v0003")
    _check_by(by)
    place = remote.open_remote(url)
    if place.is_within(store.root):
        raise RecipeError(f"{place.url}: lies inside the store itself; push to another place")
    version = _version_at(store, store.find(reference))
    made = _whole(version.path, version.reference)
    check_writable(store.root)  # before hours of copying that could not be recorded
    with store.locked(version.name) as past:
        refuse_unrecorded(past, version.reference, made)
        if (channel := reference.partition("@")[2]) in channels.CHANNELS:
            channels.refuse_wrong(store.home(version.name), past, channel, version.label)
    there = place.of(version.name, version.label)
    ours = (version.path / MANIFEST_NAME).read_bytes()
    done = _refuse_other(there, ours, made)
    missing = [entry for entry in made.files if not remote.holds(there, entry)]
    for number, entry in enumerate(missing, 1):
        told(f"{number}/{len(missing)} {entry.path}")
        remote.upload(there, entry.path, version.path / entry.path)
        if not remote.holds(there, entry):
            raise CompressError(f"{there.url}/{entry.path}: does not read back as it was written; push again")
    if not done:
        _refuse_other(there, ours, made)  # somebody may have pushed meanwhile
        remote.upload_last(there, ours)
        if remote.manifest_bytes(there) != ours:
            raise CompressError(f"{there.url}/{MANIFEST_NAME}: does not read back as it was written; push again")
    store.record(version.name, "pushed", version.label, made.digest, there.url, by)
    skipped = len(made.files) - len(missing)
    return Moved(version, made.digest, there.url, len(missing), skipped, sum(entry.bytes for entry in missing))


def pull(
    store: Store, url: str, reference: str | None = None, by: str | None = None, told: Told = lambda text: None
) -> Moved:
    """Copy `URL/NAME@v0003` (or `reference` below `url`) into the store, under the same label.

    Raises RecipeError when that label is taken by other bytes or nothing is there, CompressError when what is there is
    not what its manifest says.
    """
    _check_by(by)
    base, name, label = remote.split_reference(url, reference)
    place = remote.open_remote(base)
    label = label or remote.newest(place, name)
    there = place.of(name, label)
    content = remote.manifest_bytes(there)
    if content is None:
        raise RecipeError(f"{there.url}: there is no version (a folder with a {MANIFEST_NAME})")
    made = remote.read_manifest(there, content)
    if (made.name, made.version) != (name, label):
        raise CompressError(f"{there.url}/{MANIFEST_NAME}: says it is {made.name}@{made.version}; it was moved by hand")
    if problems := label_problems(made, label):
        raise CompressError(f"{there.url}/{problems[0]}")
    version = Version(name, label, store.root / layout.relative_path(name, label))
    if _taken(version, made):
        _whole(version.path, version.reference)
        return Moved(version, made.digest, there.url, 0, len(made.files), 0)
    check_writable(store.root, made.bytes)
    area = store.staging_area() / f"pull-{name}-{label}-{made.digest[:16]}"
    layout.refuse_link(area)
    with disk_errors(store.root), file_lock(area.with_name(f"{area.name}.pulling")):
        fetched = _fetch(there, made, area, told)
        (area / MANIFEST_NAME).write_bytes(content)
        _whole(area, there.url, label)
        _publish(store, version, made, area, there.url, by)
        area.with_name(f"{area.name}.pulling").unlink(missing_ok=True)
    return Moved(
        version, made.digest, there.url, len(fetched), len(made.files) - len(fetched), sum(e.bytes for e in fetched)
    )


def _version_at(store: Store, path: Path) -> Version:
    """A version of the store by its folder, which `find` gave."""
    name = path.relative_to(store.root).parts[0]
    return Version(name, path.name, path)


def _check_by(by: str | None) -> None:
    if mistakes := not_utf8(("--by", by)):
        raise RecipeError(mistakes)


def _whole(folder: Path, name: str, label: str | None = None) -> Manifest:
    result = verify(folder, label)
    if not result.ok:
        raise CompressError("\n".join([f"{name} is damaged and goes nowhere:", *visible_row(result.problems)]))
    return manifest.read(folder)


def _refuse_other(there: Remote, ours: bytes, made: Manifest) -> bool:
    """True if this very version is there already. Raises RecipeError if another one is."""
    theirs = remote.manifest_bytes(there)
    if theirs is None or (theirs != ours and ours.startswith(theirs)):
        return False  # nothing, or a beginning of ours that a crash left
    if theirs == ours:
        return True
    try:
        other = remote.read_manifest(there, theirs).digest
    except CompressError:
        other = "none: its manifest is damaged"
    raise RecipeError(
        f"{there.url}: another version is there (digest {other}; ours is {made.digest}). "
        "A version is never replaced; push to another place."
    )


def _taken(version: Version, made: Manifest) -> bool:
    """True if the store has this very version. Raises RecipeError if the label is another's."""
    if not os.path.lexists(version.path):
        return False
    try:
        other = manifest.read(version.path).digest
    except CompressError:
        other = "none: its manifest is missing or damaged"
    if other == made.digest:
        return True
    raise RecipeError(
        f"{version.reference} is another version here (digest {other}; there it is {made.digest}). "
        "Pull into another store: --store FOLDER."
    )


def _refuse_reuse(past: History, version: Version, made: Manifest) -> None:
    """A number that once was another version's, now collected, stays that version's."""
    for line in past.lines:
        if line.event in MADE and line.version == version.label and line.digest != made.digest:
            raise RecipeError(
                f"{version.reference} was another version here once (line {line.seq} of its history). "
                "Pull into another store: --store FOLDER."
            )


def unfinished_pulls(store: Store, remove: bool) -> list[tuple[Path, int]]:
    """Folders that killed pulls left and nobody works in, with their bytes; `remove` deletes them."""
    found: list[tuple[Path, int]] = []
    for lock in sorted((store.root / layout.STAGING).glob("pull-*.pulling")):
        with try_lock(lock) as ours:
            folder = lock.with_suffix("")
            if not ours:
                continue
            if folder.is_dir() and not folder.is_symlink():
                found.append((folder, sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())))
                if remove:
                    shutil.rmtree(folder)
            if remove:
                lock.unlink(missing_ok=True)
    return found


def _fetch(there: Remote, made: Manifest, area: Path, told: Told) -> list[FileEntry]:
    """Bring every file of `made` into `area`; those with the right bytes are there already. Returns the others."""
    area.mkdir(exist_ok=True)
    strangers = {*manifest.list_files(area)[0], *manifest.list_files(area)[1]} - {entry.path for entry in made.files}
    for path in strangers:
        (area / path).unlink()
    missing = [entry for entry in made.files if not _has(area / entry.path, entry)]
    for number, entry in enumerate(missing, 1):
        told(f"{number}/{len(missing)} {entry.path}")
        target = area / entry.path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)  # a killed pull may have left it read-only
        digest, size = hashlib.sha256(), 0
        with target.open("wb") as writer:
            for piece in remote.pieces(there, entry.path):
                size += len(piece)
                if size > entry.bytes:
                    break
                digest.update(piece)
                writer.write(piece)
        if size != entry.bytes or digest.hexdigest() != entry.sha256:
            target.unlink()
            raise CompressError(f"{there.url}/{entry.path}: is not what the manifest there says; push it again")
    return missing


def _has(path: Path, entry: FileEntry) -> bool:
    return path.is_file() and path.stat().st_size == entry.bytes and hash_file(path) == entry.sha256


def _publish(store: Store, version: Version, made: Manifest, area: Path, url: str, by: str | None) -> None:
    """Line first, rename after it: the manifest remembers another history, so a lost line could not be told from one
    that was taken away."""
    share(store.root, area, made.files)
    seal(area)
    draft = Draft(
        event="pulled",
        who=by or history.whoever(),
        version=version.label,
        digest=made.digest,
        detail=f"from {url}",
        parent=made.parent,
    )
    with store.locked(version.name) as past:
        layout.refuse_link(version.path.parent)
        layout.make_folder(version.path.parent)
        if _taken(version, made):
            shutil.rmtree(area)
            return
        _refuse_reuse(past, version, made)
        history.append(store.home(version.name), past, [draft])
        os.rename(area, version.path)
        flush(version.path.parent, recurse=False)
