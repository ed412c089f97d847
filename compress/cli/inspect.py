"""`compress list`, `show`, `verify` and `gc`: looking at the store."""

from __future__ import annotations

import json as json_
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from compress.cli.options import DEFAULT_STORE, JsonOption, ReferenceArgument, StoreOption
from compress.errors import RecipeError


def list_(
    name: Annotated[str | None, typer.Argument(help="Only versions of this name.")] = None,
    store: StoreOption = DEFAULT_STORE,
    json: JsonOption = False,
) -> int:
    """List the artifacts of a store: published versions and rejected runs."""
    from compress import console
    from compress.artifacts import manifest
    from compress.artifacts.store import Store
    from compress.errors import CompressError, nearest

    opened = Store(store)
    names = opened.names()
    if name is not None and name not in names:
        raise RecipeError(f"nothing in {store} is called {name!r}.{nearest(name, names)}")
    rows: list[dict[str, Any]] = []
    for entry in [name] if name else names:
        for version in opened.versions(entry):
            row: dict[str, Any] = {"name": entry, "version": version.label, "path": str(version.path)}
            try:
                read = manifest.read(version.path)
                row |= {
                    "verdict": read.verdict,
                    "created": read.created.isoformat(),
                    "bytes": sum(file.bytes for file in read.files),
                    "model_digest": read.model_digest,
                }
            except CompressError as error:
                row |= {"verdict": "damaged", "created": "", "bytes": None, "model_digest": "", "problem": str(error)}
            rows.append(row)
    if json:
        console.print_json(rows)
    elif not rows:
        console.print_line(f"{store} holds no artifacts.")
    else:
        cells = [
            [
                row["name"],
                row["version"],
                row["verdict"],
                row["created"],
                console.bytes_text(row["bytes"]),
                row["model_digest"][:12],
            ]
            for row in rows
        ]
        console.print_table(str(store), ["name", "version", "verdict", "created", "size", "model digest"], cells)
    return 0


def show(reference: ReferenceArgument, store: StoreOption = DEFAULT_STORE, json: JsonOption = False) -> int:
    """Show the report of one artifact."""
    from compress import console
    from compress.artifacts.store import Store
    from compress.errors import CompressError

    folder = Store(store).find(reference)
    path = folder / "reports" / ("report.json" if json else "report.md")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise CompressError(
            f"{path}: cannot be read ({error}). `compress verify {reference}` tells what is missing."
        ) from error
    if json:
        console.print_json(json_.loads(text))
    else:
        console.print_line(text.rstrip())
        console.print_line(f"\nHTML: {folder / 'reports' / 'report.html'}")
    return 0


def verify(
    reference: Annotated[
        str | None,
        typer.Argument(help="NAME, NAME@v0003, NAME@r0001, NAME@production or a folder.", metavar="ARTIFACT"),
    ] = None,
    all_: Annotated[
        bool, typer.Option("--all", help="The whole store: every version, history, channel and signature.")
    ] = False,
    store: StoreOption = DEFAULT_STORE,
    json: JsonOption = False,
) -> int:
    """Re-hash every file of an artifact; look for NaN, missing and extra tensors. Exit 0 if it is whole, 1 if not."""
    from compress import console
    from compress.artifacts.store import Store
    from compress.artifacts.verify import verify as check

    if all_ == (reference is not None):
        raise RecipeError("verify one ARTIFACT, or --all for the whole store")
    if reference is None:
        return _verify_store(store, json)
    result = check(Store(store).find(reference))
    if json:
        console.print_json(
            {
                "path": str(result.folder),
                "ok": result.ok,
                "files": result.files,
                "bytes": result.bytes,
                "tensors": result.tensors,
                "problems": list(result.problems),
            }
        )
    elif result.ok:
        size = console.bytes_text(result.bytes)
        console.print_line(
            f"{result.folder}: whole. {result.files} files, {size}, {result.tensors} tensors, all finite."
        )
    else:
        for problem in result.problems:
            console.print_error(problem)
    return 0 if result.ok else 1


def _verify_store(store: Path, json: bool) -> int:
    from compress import console
    from compress.artifacts.audit import audit
    from compress.artifacts.store import Store

    if not store.is_dir():
        raise RecipeError(f"{store}: there is no store; name one with --store")
    found = audit(Store(store), console.note)
    if json:
        console.print_json(
            {
                "path": str(found.root),
                "ok": found.ok,
                "names": found.names,
                "versions": len(found.versions),
                "files": sum(version.files for version in found.versions),
                "bytes": sum(version.bytes for version in found.versions),
                "problems": list(found.problems),
                "notes": list(found.notes),
            }
        )
        return 0 if found.ok else 1
    for remark in found.notes:
        console.note(f"note: {remark}")
    for problem in found.problems:
        console.print_error(problem)
    if found.ok:
        size = console.bytes_text(sum(version.bytes for version in found.versions))
        console.print_line(f"{store}: whole. {found.names} names, {len(found.versions)} versions, {size}.")
    return 0 if found.ok else 1


def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
    json: JsonOption = False,
) -> int:
    """Remove cached stages and baselines. Artifacts and converted source models are left alone."""
    from filelock import FileLock, Timeout

    from compress import console
    from compress.checkpoints.sources import cache_folder

    removed: list[dict[str, Any]] = []
    for area in ("stages", "baselines", "frontiers"):
        folder = cache_folder() / area
        for entry in sorted(folder.iterdir()) if folder.is_dir() else []:
            if entry.suffix == ".lock":
                continue
            lock = FileLock(f"{entry}.lock")
            try:
                with lock.acquire(timeout=0):
                    removed.append({"path": str(entry), "bytes": _size(entry)})
                    if not dry_run:
                        _remove(entry)
            except Timeout:
                console.note(f"{entry}: in use by a run, left alone")
    total = sum(entry["bytes"] for entry in removed)
    if json:
        console.print_json({"dry_run": dry_run, "bytes": total, "removed": removed})
    else:
        word = "would free" if dry_run else "freed"
        console.print_line(f"{word} {console.bytes_text(total)} in {len(removed)} entries of {cache_folder()}")
    return 0


def _size(path: Path) -> int:
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
