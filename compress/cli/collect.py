"""`compress gc`: room in the cache, or in the store."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from compress.cli.options import DEFAULT_STORE, JsonOption, StoreOption
from compress.errors import RecipeError


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
    """Remove cached stages, baselines and sampled texts. Artifacts and converted source models are left alone.

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
    from compress.artifacts.words import visible

    if not store.is_dir():
        raise RecipeError(f"{store}: there is no store; name one with --store")
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
        console.note(f"{each.version.reference} stays: {visible(each.why)}")
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
    for area in ("stages", "baselines", "frontiers", "listings", "texts"):
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
