"""Where things lie in a store, and what they may be called. Reads folders; writes nothing but empty ones.

<store>/<name>/v0001/                      published
<store>/<name>/rejected/r0001/             kept, but a gate failed or was inconclusive
<store>/<name>/channels/production.json    what a deploy job reads (channels.py)
<store>/<name>/history.jsonl, .head        what happened, in order (history.py)
<store>/<name>/.lock                       held while any of these changes
<store>/.staging/                          artifacts being written, received or removed
<store>/allowed_signers                    whose waivers count, if it is there (signing.py)
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from compress.artifacts.manifest import MANIFEST_NAME
from compress.errors import RecipeError, ResourceError, nearest

NAME_RULE = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
LABEL_RULE = re.compile(r"([vr])([0-9]{1,9})")
STAGING = ".staging"
REJECTED = "rejected"
LOCK = ".lock"


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


def check_name(name: str) -> None:
    """Raises RecipeError for a name that could be anything but one folder in the store."""
    if not NAME_RULE.fullmatch(name):
        raise RecipeError(
            f"{name!r} cannot name an artifact: use at most 64 of a-z, 0-9, dot, underscore and hyphen, "
            "beginning with a letter or digit, so that it stays one folder inside the store"
        )


def whole_label(label: str) -> str | None:
    """'v3' -> 'v0003'; None for what is no label."""
    matched = LABEL_RULE.fullmatch(label)
    return f"{matched[1]}{int(matched[2]):04d}" if matched else None


def place_of(label: str) -> str:
    """Where a version lies below the folder of its name."""
    return f"{REJECTED}/{label}" if label.startswith("r") else label


def relative_path(name: str, label: str) -> str:
    """Where a version lies below its store, with forward slashes."""
    return f"{name}/{place_of(label)}"


def entries(folder: Path) -> list[str]:
    """Names of the true folders in `folder`; links are never followed."""
    try:
        with os.scandir(folder) as found:
            return [entry.name for entry in found if entry.is_dir(follow_symlinks=False)]
    except (FileNotFoundError, NotADirectoryError):
        return []


def numbered(parent: Path, rejected: bool) -> Iterator[tuple[str, int]]:
    """(label, number) of every folder in `parent` that is called like a version."""
    for name in entries(parent):
        matched = LABEL_RULE.fullmatch(name)
        if matched and (matched[1] == "r") == rejected and name == f"{matched[1]}{int(matched[2]):04d}":
            yield name, int(matched[2])


def highest(parent: Path, rejected: bool) -> int:
    """The highest number there, whatever state that folder is in; 0 if there is none."""
    return max((number for _, number in numbered(parent, rejected)), default=0)


def numbered_folders(home: Path) -> Iterator[tuple[str, str]]:
    """(label, path) of published versions, then rejected runs, in the order of their numbers, manifest or not.

    Paths are strings: a Path for each of ten thousand versions takes longer than all the rest of a listing.
    """
    for parent, rejected in ((home, False), (home / REJECTED, True)):
        if not parent.is_symlink():
            for _, label in sorted((number, label) for label, number in numbered(parent, rejected)):
                yield label, f"{parent}/{label}"


def versions_in(home: Path) -> Iterator[Version]:
    """Published versions, then rejected runs, in the order of their numbers; only folders with a manifest."""
    for label, path in numbered_folders(home):
        if os.path.isfile(f"{path}/{MANIFEST_NAME}"):
            yield Version(home.name, label, Path(path))


def choose(versions: list[Version], name: str, label: str) -> Version:
    """The version called `label`, however many zeros it is given. Raises RecipeError naming the nearest one."""
    wanted = whole_label(label) or label
    for version in versions:
        if version.label == wanted:
            return version
    guess = nearest(label, [version.label for version in versions])
    newest = ([version for version in versions if not version.rejected] or versions)[-1]
    raise RecipeError(f'"{name}" has no version "{label}"; the newest is {newest.label}.{guess}')


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ResourceError(f"{folder}: a file is where a folder should be; choose another store") from None


def refuse_link(path: Path) -> None:
    if path.is_symlink():
        raise RecipeError(f"{path} is a link and could lead outside the store; replace it by what it points to")
