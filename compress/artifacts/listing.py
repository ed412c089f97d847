"""Rows for `compress list`, quick for ten thousand versions.

A manifest is read once and what a row needs of it remembered in the user's cache, beside the inode, size and times of
the file. The row is used again only while all of these are the same: the change time (ctime) moves with every write,
rename, link or change of mode, and cannot be set. A manifest younger than two seconds is not remembered, since the
clock of a file system may stand still that long. What is remembered lies with the user and not in the store, so that
nobody who can write the store can make it say anything. Nothing but `list` uses it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.artifacts import layout, manifest
from compress.artifacts.manifest import MANIFEST_NAME
from compress.artifacts.store import Store
from compress.errors import CompressError
from compress.files import write_text

_YOUNG_NS = 2_000_000_000
_WORTH = 50
"""Manifests read anew, from which on the rows are written to the cache again."""


@dataclass(frozen=True)
class Row:
    """One version. `bytes` None and verdict `damaged`: its manifest cannot be read; `problem` says why."""

    name: str
    version: str
    path: str
    verdict: str
    created: str
    bytes: int | None
    model_digest: str
    problem: str = ""


def rows(store: Store, names: Iterable[str], cache: Path) -> list[Row]:
    """Every version of `names`, in order. `cache`: a folder of the user for what is remembered."""
    path = cache / f"{hashlib.sha256(str(store.root).encode()).hexdigest()[:32]}.json"
    remembered = _load(path)
    made: list[Row] = []
    kept: dict[str, list[Any]] = {}
    anew = 0
    now = time.time_ns()
    for name in names:
        for label, folder in layout.numbered_folders(store.home(name)):
            try:
                found = os.stat(f"{folder}/{MANIFEST_NAME}", follow_symlinks=False)
            except (FileNotFoundError, NotADirectoryError):
                continue
            key = [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]
            entry = remembered.get(folder)
            if entry is not None and entry[0] == key:
                made.append(Row(name, label, folder, *entry[1]))
                kept[folder] = entry
                continue
            row = _read(name, label, folder)
            made.append(row)
            anew += 1
            if not row.problem and now - found.st_ctime_ns > _YOUNG_NS:
                kept[folder] = [key, [row.verdict, row.created, row.bytes, row.model_digest]]
    if anew >= _WORTH:
        _save(path, kept)
    return made


def _read(name: str, label: str, folder: str) -> Row:
    try:
        found = manifest.read(folder)
    except CompressError as error:
        return Row(name, label, folder, "damaged", "", None, "", str(error))
    return Row(name, label, folder, found.verdict, found.created.isoformat(), found.bytes, found.model_digest)


def _load(path: Path) -> dict[str, list[Any]]:
    """What is remembered, if it is as it was written; else nothing."""
    try:
        digest, _, text = path.read_text(encoding="utf-8").partition("\n")
    except (OSError, UnicodeDecodeError):
        return {}
    if hashlib.sha256(text.encode()).hexdigest() != digest:
        return {}
    entries: dict[str, list[Any]] = json.loads(text)
    return entries


def _save(path: Path, entries: dict[str, list[Any]]) -> None:
    text = json.dumps(entries)
    # A cache that cannot be written costs time and nothing else.
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}")
