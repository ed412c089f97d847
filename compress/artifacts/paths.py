"""Which paths a manifest may list: plain ones inside the artifact, that every common file system takes."""

from __future__ import annotations

from collections.abc import Iterable

MANIFEST_NAME = "manifest.json"
MOST_NAME_BYTES = 255
MOST_PATH = 1024


def inside(path: str) -> str:
    """`path`, if an artifact may hold it. Raises ValueError."""
    # By hand and not with PurePosixPath, which makes listing thousands of versions three times as slow.
    parts = path.split("/")
    if not {"", ".", ".."}.isdisjoint(parts):
        raise ValueError(f"{path!r} is not a plain path inside the artifact")
    if "\0" in path or parts[0] == MANIFEST_NAME:
        raise ValueError(f"{path!r} cannot be a file of an artifact")
    if len(path) > MOST_NAME_BYTES // 4 and _is_long(path):
        raise ValueError(f"{path[:40]!r}... is longer than a file system takes")
    return path


def _is_long(path: str) -> bool:
    longest = max(len(part.encode("utf-8", "replace")) for part in path.split("/"))
    return longest > MOST_NAME_BYTES or len(path) > MOST_PATH


def refuse_files_as_folders(paths: Iterable[str]) -> None:
    """Raises ValueError for a path that lies below another one."""
    known = set(paths)
    folders: set[str] = set()
    for path in known:
        folder = path.rpartition("/")[0]
        while folder and folder not in folders:
            folders.add(folder)
            folder = folder.rpartition("/")[0]
    if both := sorted(known & folders):
        raise ValueError(f"{both[0]!r} is a file and also a folder")
