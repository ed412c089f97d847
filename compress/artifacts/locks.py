"""Exclusive locks that their holder's death releases: flock(2).

A process id in a file would not do: ids are reused, and mean nothing to another container that shares the store.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Hold an exclusive flock on `path`, waiting for others; the file is made if missing.

    The kernel releases it when the process ends in any way. A holder may delete the file it has locked; whoever was
    waiting then holds a file that has no name any more, notices, and locks the new one.
    """
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            if _still_named(handle, path):
                yield
                return
        finally:
            os.close(handle)


@contextmanager
def try_lock(path: Path) -> Iterator[bool]:
    """Give True and hold the flock on the existing file `path` when nobody else does; else give False at once."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        yield False
        return
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield _still_named(handle, path)
    finally:
        os.close(handle)


@contextmanager
def read_lock(path: Path) -> Iterator[None]:
    """Keep writers away while something is read. Without a lock file nobody ever wrote, and nothing is waited for."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        yield
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_SH)
        yield
    finally:
        os.close(handle)


def _still_named(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False
