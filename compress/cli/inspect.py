"""`compress list`, `show` and `verify`: looking at the store."""

from __future__ import annotations

import json as json_
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
    """List the artifacts of a store: published versions and rejected runs, and which channels hold them.

    Exit 1 if the file of a channel is damaged.
    """
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
    return 1 if problems else 0


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
    """Re-hash every file of an artifact; look for NaN, missing and extra tensors. Exit 0 if it is whole, 1 if not.

    NAME@production also compares the channel's file with the history, and the version with the one promoted.
    """
    from compress import console
    from compress.artifacts.audit import audit_channel
    from compress.artifacts.channels import CHANNELS
    from compress.artifacts.store import Store
    from compress.artifacts.verify import verify as check
    from compress.artifacts.words import visible

    if all_ == (reference is not None):
        raise RecipeError("verify one ARTIFACT, or --all for the whole store")
    if reference is None:
        return _verify_store(store, json)
    opened = Store(store)
    name, _, channel = reference.partition("@")
    if channel not in CHANNELS or "/" in reference:
        channel = ""
    result = audit_channel(opened, name, channel) if channel else check(opened.find(reference))
    if json:
        console.print_json(
            {
                "path": str(result.folder),
                **({"channel": channel} if channel else {}),
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
        if channel:
            console.print_line(f"{channel} of {name} and its line in the history say the same version and digest.")
    else:
        for problem in result.problems:
            console.print_error(visible(problem))
    return 0 if result.ok else 1


def _verify_store(store: Path, json: bool) -> int:
    from compress import console
    from compress.artifacts.audit import audit
    from compress.artifacts.store import Store
    from compress.artifacts.words import visible

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
        console.note(f"note: {visible(remark)}")
    for problem in found.problems:
        console.print_error(visible(problem))
    if found.ok:
        size = console.bytes_text(sum(version.bytes for version in found.versions))
        console.print_line(f"{store}: whole. {found.names} names, {len(found.versions)} versions, {size}.")
    return 0 if found.ok else 1
