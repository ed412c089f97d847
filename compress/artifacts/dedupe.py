"""Equal files inside a store share their bytes by hard link, and published files are read-only.

A file about to be published is replaced by a link to a published one with the same sha256, in the staging folder,
before the rename that publishes: a crash leaves nothing new to think about. The published file is hashed again first,
so that damage is not spread to a version that was whole. Where the file system has no links, or no more of them, the
copy stays.

Sharing has a price: damage to shared bytes damages every version that has them. `verify` hashes each version's files
and names all of them.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from compress.artifacts.layout import NAME_RULE, entries, versions_in
from compress.artifacts.manifest import MANIFEST_NAME, FileEntry, hash_file

_NO_LINK = (errno.EMLINK, errno.EPERM, errno.EXDEV, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOENT)
_TEMPORARY = ".link"


def share(root: Path, folder: Path, files: Iterable[FileEntry]) -> int:
    """Replace files of `folder` by links to equal published files of the store `root`. Returns the bytes saved."""
    wanted: dict[str, list[FileEntry]] = {}
    for entry in files:
        if entry.bytes:
            wanted.setdefault(entry.sha256, []).append(entry)
    saved = 0
    for sha256, path in _published(root, set(wanted)):
        if sha256 in wanted and _holds(path, wanted[sha256][0]):
            linked = [entry for entry in wanted[sha256] if _link(path, folder / entry.path)]
            saved += sum(entry.bytes for entry in linked)
            if linked:
                del wanted[sha256]
        if not wanted:
            break
    return saved


def make_read_only(folder: Path) -> None:
    """Take the right to write from every file below `folder`; folders keep it, or nothing could ever be removed."""
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent) / name
            mode = stat.S_IMODE(path.stat().st_mode)
            if mode & 0o222:
                path.chmod(mode & ~0o222)


def shared_bytes(folder: Path) -> int:
    """Bytes of a version's folder that at least one other version also has."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            found = os.lstat(os.path.join(parent, name))
            total += found.st_size if found.st_nlink > 1 and stat.S_ISREG(found.st_mode) else 0
    return total


def _published(root: Path, wanted: set[str]) -> Iterator[tuple[str, Path]]:
    """(sha256, path) of every published file whose manifest says it is wanted, newest versions first."""
    needles = {sha256: sha256.encode() for sha256 in wanted}
    for name in entries(root):
        if not NAME_RULE.fullmatch(name):
            continue
        for version in reversed(list(versions_in(root / name))):
            try:
                content = (version.path / MANIFEST_NAME).read_bytes()
                # Looking for the text is far cheaper than parsing each of thousands of manifests.
                if not any(needle in content for needle in needles.values()):
                    continue
                listed = [(str(item["sha256"]), str(item["path"])) for item in json.loads(content)["files"]]
            except (OSError, ValueError, KeyError, TypeError):
                continue
            for sha256, path in listed:
                if sha256 in needles and ".." not in path.split("/"):
                    yield sha256, version.path / path


def _holds(path: Path, entry: FileEntry) -> bool:
    """Whether the published file is a plain one with these bytes still."""
    try:
        found = path.lstat()
        return stat.S_ISREG(found.st_mode) and found.st_size == entry.bytes and hash_file(path) == entry.sha256
    except OSError:
        return False


def _link(source: Path, target: Path) -> bool:
    temporary = target.with_name(f"{target.name}{_TEMPORARY}")
    try:
        if os.path.samestat(source.lstat(), target.lstat()):
            return True  # a killed pull came this far; rename(2) between two links of one file does nothing
        os.link(source, temporary, follow_symlinks=False)
    except OSError as error:
        if error.errno in _NO_LINK:
            return False
        raise
    temporary.replace(target)
    return True
