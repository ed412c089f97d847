"""Files that survive a kill (written beside, flushed, renamed into place), and disk errors in words."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any

from compress.errors import ResourceError

CHUNK = 1 << 22
HASHED_AT_ONCE = 8
"""Files; more would only make a disk seek."""
_REMEDIES: dict[int, str] = {
    errno.ENOSPC: "the disk is full; free some space or choose {what} on another disk",
    errno.EDQUOT: "the disk quota is used up; free some space or choose {what} on another disk",
    errno.EROFS: "the file system is read-only; choose {what} that can be written",
    errno.EACCES: "writing is not permitted; change the permissions or choose {what} elsewhere",
    errno.EPERM: "writing is not permitted; change the permissions or choose {what} elsewhere",
    errno.ENOLCK: "the file system has no locks to give; choose {what} on a local disk",
    errno.EOPNOTSUPP: "the file system cannot lock files; choose {what} on a local disk",
}
_FULL = (errno.ENOSPC, errno.EDQUOT)
A_CACHE = "a COMPRESS_CACHE"
"""What a remedy names where the cache has no room."""


def cache_folder() -> Path:
    """Where converted models, stages, baselines and listings are kept: $COMPRESS_CACHE or ~/.cache/compress."""
    return Path(os.environ.get("COMPRESS_CACHE") or Path.home() / ".cache" / "compress")


def sha256_of(path: Path, stop: Event | None = None) -> str:
    """Hex digest of a file, read in chunks. Raises InterruptedError once somebody sets `stop`."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            if stop is not None and stop.is_set():
                raise InterruptedError(f"{path}: hashing was stopped")
            digest.update(chunk)
    return digest.hexdigest()


def digests_of(paths: Iterable[Path], stop: Event | None = None) -> dict[str, str]:
    """`sha256_of` each file, by file name; several at a time, since hashing one keeps one core busy and no more."""
    paths = list(paths)
    with ThreadPoolExecutor(min(HASHED_AT_ONCE, os.cpu_count() or 1)) as threads:
        found = threads.map(lambda path: sha256_of(path, stop), paths)
        return {path.name: digest for path, digest in zip(paths, found, strict=True)}


def digest_of_json(value: Any) -> str:
    """Hex digest of a JSON value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary sibling of `path` that takes its place when the block ends without an error."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, sort_keys=True) + "\n")


@contextmanager
def disk_errors(place: Path, what: str = "a store") -> Iterator[None]:
    """Turn disk errors about `place`, its parents or what is below it into a ResourceError with path and remedy: to
    choose `what` elsewhere.

    Other errors pass, such as a file elsewhere that the block may not read. A full disk is always translated.
    """
    try:
        yield
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0)
        if remedy is None or not (error.errno in _FULL or _concerns(error.filename, place)):
            raise
        raise ResourceError(f"{error.filename or place}: {remedy.format(what=what)}") from error
    except Exception as error:
        # safetensors writes through Rust and raises an error of its own that is no OSError.
        if "os error 28" not in str(error):
            raise
        raise ResourceError(f"{place}: {_REMEDIES[errno.ENOSPC].format(what=what)}") from error


def _concerns(filename: object, place: Path) -> bool:
    if not isinstance(filename, str):
        return True
    path = Path(filename)
    return path.is_relative_to(place) or place.is_relative_to(path)


def flush(folder: Path, recurse: bool = True) -> None:
    """fsync `folder`, and with `recurse` everything below it first: after this a power loss cannot undo it."""
    if recurse:
        for parent, _, names in os.walk(folder, topdown=False):
            for name in names:
                _fsync(Path(parent) / name)
            if Path(parent) != folder:
                _fsync(Path(parent))
    _fsync(folder)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
