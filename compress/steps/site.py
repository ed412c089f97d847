"""What the index site shows of a store, and the site as a folder that is swapped in whole."""

from __future__ import annotations

import glob
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import psutil
from pydantic import ValidationError

from compress.artifacts import manifest
from compress.artifacts.store import Store, Version
from compress.errors import CompressError, RecipeError
from compress.events import Progress
from compress.files import disk_errors
from compress.reports.site import Entry, Shelf, listing, site
from compress.reports.standing import NOTHING
from compress.steps.previous import read_report
from compress.steps.standing import standing_of

LISTING = "site.json"
"""The site for programs; also how a folder is known to be a site that may be written again."""
OURS = {LISTING, "index.html", "models"}
"""What lies in a site's folder."""
MADE_BY = "compress site"


def shelves_of(store: Store, progress: Progress) -> list[Shelf]:
    """Every name of a store with its versions, the newest first, then rejected runs."""
    names = store.names()
    found = []
    with progress.task("reading the store", len(names)) as advance:
        for name in names:
            versions = store.versions(name)
            ordered = sorted(versions, key=lambda version: version.rejected)
            published = [version for version in ordered if not version.rejected][::-1]
            rejected = [version for version in ordered if version.rejected][::-1]
            entries = tuple(_entry(store, version) for version in (*published, *rejected))
            found.append(Shelf(name, entries))
            advance(name)
    return found


def _entry(store: Store, version: Version) -> Entry:
    """A version that cannot be read has a row all the same, which says why."""
    try:
        read = manifest.read(version.path)
    except CompressError as error:
        return Entry(version.label, "damaged", "", None, "", problem=str(error))
    standing, problem, report = NOTHING, "", None
    try:
        standing = standing_of(store, version.name, version.label)
        report = read_report(version.path)
    except CompressError as error:
        problem = str(error)
    except (OSError, ValidationError) as error:
        problem = f"its report.json cannot be read ({type(error).__name__})"
    return Entry(
        label=version.label,
        verdict=read.verdict,
        created=read.created.isoformat(),
        bytes=sum(file.bytes for file in read.files),
        digest=read.model_digest,
        standing=standing,
        report=report,
        problem=problem,
    )


def write_site(shelves: list[Shelf], title: str, out: Path) -> dict[str, Any]:
    """Write the site beside `out`, then put it in its place by two renames: for the moment between them there is none,
    and who is killed there leaves the old one to be put back by the next run.

    Returns what site.json holds. Raises ResourceError for a disk that is full or not writable.
    """
    document = {"schema": 1, "made_by": MADE_BY, "title": title, "models": listing(shelves)}
    fresh, old = (out.with_name(f".{out.name}.{os.getpid()}.{word}") for word in ("new", "old"))
    with disk_errors(out, "a place"):
        out.parent.mkdir(parents=True, exist_ok=True)
        _sweep(out)
        try:
            for path, text in site(shelves, title).items():
                place = fresh / path
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_text(text, encoding="utf-8", newline="\n")
            (fresh / LISTING).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
            if out.exists():
                out.rename(old)
            fresh.rename(out)
        finally:
            if old.exists() and not out.exists():
                old.rename(out)
            shutil.rmtree(fresh, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)
    return document


def _sweep(out: Path) -> None:
    """Remove what killed processes left beside `out`; a site that one of them had moved away is put back."""
    for path in sorted(out.parent.glob(f".{glob.escape(out.name)}.*")):
        found = re.fullmatch(r"\.(\d+)\.(new|old)", path.name.removeprefix(f".{out.name}"))
        if not found or psutil.pid_exists(int(found[1])):
            continue
        if found[2] == "old" and not out.exists():
            path.rename(out)
        else:
            shutil.rmtree(path, ignore_errors=True)


def check_place(out: Path, store: Store) -> None:
    """Raises RecipeError unless `out` is new, empty or a site made before, and outside the store."""
    place = out.expanduser().resolve()
    if place.is_relative_to(store.root) or store.root.is_relative_to(place):
        raise RecipeError(f"--out {out}: the store and the site may not lie in one another; name another folder")
    if any(parent.exists() and not parent.is_dir() for parent in place.parents):
        raise RecipeError(f"--out {out}: a part of this path is a file; name another folder")
    if not place.exists():
        return
    if not place.is_dir() or (any(place.iterdir()) and not _is_ours(place / LISTING)):
        raise RecipeError(
            f"--out {out}: exists and is no site made by this command (there is no {LISTING} of its own); name another"
        )
    strangers = sorted(path.name for path in place.iterdir() if path.name not in OURS)
    if strangers:
        raise RecipeError(
            f"--out {out}: holds {', '.join(strangers[:5])}, which this command did not write, and the folder is "
            "replaced whole. Name a folder of the site's own, and copy it from there"
        )


def _is_ours(path: Path) -> bool:
    """Whether a site.json was written here: by this version, or by one that did not sign."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        return document.get("made_by", MADE_BY) == MADE_BY and isinstance(document["models"], list)
    except (OSError, ValueError, KeyError, AttributeError):
        return False
