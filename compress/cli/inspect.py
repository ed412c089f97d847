"""`compress list`, `show`, `verify` and `gc`: looking at the store."""

from __future__ import annotations

import json as json_
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compress.cli.options import DEFAULT_STORE, JsonOption, ReferenceArgument, StoreOption
from compress.errors import RecipeError

if TYPE_CHECKING:
    from compress.artifacts.store import Store


def list_(
    name: Annotated[str | None, typer.Argument(help="Only versions of this name.")] = None,
    shared: Annotated[
        bool, typer.Option("--shared", help="Also how many bytes other versions have too, which looks at every file.")
    ] = False,
    store: StoreOption = DEFAULT_STORE,
    json: JsonOption = False,
) -> int:
    """List the artifacts of a store: published versions and rejected runs, and which channels hold them."""
    from compress import console
    from compress.artifacts import listing
    from compress.artifacts.dedupe import shared_bytes
    from compress.artifacts.store import Store
    from compress.errors import nearest
    from compress.files import cache_folder

    opened = Store(store)
    if name is not None and not opened.versions(name):
        raise RecipeError(f"nothing in {store} is called {name!r}.{nearest(name, opened.names())}")
    names = [name] if name is not None else opened.names()
    found = listing.rows(opened, names, cache_folder() / "listings")
    held, problems = _held(opened, names)
    rows: list[dict[str, Any]] = []
    for each in found:
        row = {**vars(each), "channels": held.get((each.name, each.version), [])}
        if not each.problem:
            del row["problem"]
        if shared:
            row["shared_bytes"] = shared_bytes(Path(each.path))
        rows.append(row)
    for problem in problems:
        console.print_error(problem)
    if json:
        console.print_json_rows(rows)
    elif not rows:
        console.print_line(f"{store} holds no artifacts.")
    else:
        _print_versions(str(store), rows, shared)
    return 0


def _held(opened: Store, names: list[str]) -> tuple[dict[tuple[str, str], list[str]], list[str]]:
    """Which channels hold which version; and channels of which that cannot be told."""
    from compress.artifacts import channels
    from compress.errors import CompressError

    held: dict[tuple[str, str], list[str]] = {}
    problems: list[str] = []
    for name in names:
        for channel in channels.CHANNELS:
            try:
                found = channels.read(opened.home(name), channel)
            except CompressError as error:
                problems.append(str(error))
                continue
            if found:
                held.setdefault((name, found.version), []).append(channel)
    return held, problems


def _print_versions(title: str, rows: list[dict[str, Any]], shared: bool) -> None:
    from compress import console

    columns = ["name", "version", "verdict", "channels", "created", "size", "model digest"]
    cells = [
        [
            row["name"],
            row["version"],
            row["verdict"],
            ", ".join(row["channels"]),
            row["created"],
            console.bytes_text(row["bytes"]),
            row["model_digest"][:12],
            *([console.bytes_text(row["shared_bytes"])] if shared else []),
        ]
        for row in rows
    ]
    console.print_table(title, [*columns, *(["shared"] if shared else [])], cells)


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
    name: Annotated[str | None, typer.Argument(help="With --artifacts: only versions of this name.")] = None,
    artifacts: Annotated[
        bool, typer.Option("--artifacts", help="Remove versions of the store instead of cached stages.")
    ] = False,
    keep: Annotated[
        int | None,
        typer.Option("--keep", metavar="N", help="With --artifacts: the newest N published of a name stay."),
    ] = None,
    rejected_older_than: Annotated[
        str | None,
        typer.Option("--rejected-older-than", metavar="AGE", help="With --artifacts: rejected runs older than 30d go."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
    store: StoreOption = DEFAULT_STORE,
    json: JsonOption = False,
) -> int:
    """Remove cached stages and baselines. Artifacts and converted source models are left alone.

    With --artifacts, versions of the store go instead. What a channel holds or would go back to, what was waived, and
    what a kept version was made from stays. Every removal is a line of the history.
    """
    if artifacts:
        return _gc_artifacts(name, keep, rejected_older_than, dry_run, store, json)
    if name is not None or keep is not None or rejected_older_than is not None:
        raise RecipeError("NAME, --keep and --rejected-older-than are about versions of the store: add --artifacts")
    return _gc_cache(dry_run, json)


def _gc_artifacts(
    name: str | None, keep: int | None, rejected_older_than: str | None, dry_run: bool, store: Path, json: bool
) -> int:
    from compress import console
    from compress.artifacts.collect import Rules, collect, read_age
    from compress.artifacts.store import Store
    from compress.artifacts.transport import unfinished_pulls

    rules = Rules(keep, read_age(rejected_older_than) if rejected_older_than else None)
    done = collect(Store(store), rules, name, dry_run)
    unfinished = unfinished_pulls(Store(store), remove=not dry_run)
    freed = done.freed + sum(size for _, size in unfinished)
    gone = [
        {"reference": each.version.reference, "path": str(each.version.path), "bytes": each.bytes, "why": each.why}
        for each in done.gone
    ]
    gone += [{"path": str(path), "bytes": size, "why": "a pull that never ended"} for path, size in unfinished]
    kept = [{"reference": each.version.reference, "why": each.why} for each in done.kept]
    if json:
        console.print_json({"dry_run": dry_run, "bytes": freed, "removed": gone, "kept": kept})
        return 0
    for each in done.kept:
        console.note(f"{each.version.reference} stays: {each.why}")
    for went in done.gone:
        console.print_line(f"{went.version.reference}: {went.why}, {console.bytes_text(went.bytes)}")
    for path, size in unfinished:
        console.print_line(f"{path}: a pull that never ended, {console.bytes_text(size)}")
    word = "would free" if dry_run else "freed"
    shared = sum(went.bytes for went in done.gone) - done.freed
    still = f"; {console.bytes_text(shared)} of them are shared with versions that stay" if shared > 0 else ""
    console.print_line(f"{word} {console.bytes_text(freed)} in {len(done.gone)} versions of {store}{still}")
    return 0


def _gc_cache(dry_run: bool, json: bool) -> int:
    from filelock import FileLock, Timeout

    from compress import console
    from compress.checkpoints.sources import cache_folder

    removed: list[dict[str, Any]] = []
    for area in ("stages", "baselines", "frontiers", "listings"):
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
