"""`compress report`: the report of an artifact again, drawn today, with its channels and waivers as they are now."""

from __future__ import annotations

import json as json_
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from compress.cli.options import DEFAULT_STORE, JsonOption, ReferenceArgument, StoreOption

if TYPE_CHECKING:
    from compress.reports.report import Report
    from compress.reports.standing import Standing

FORMATS: tuple[Literal["md", "html", "json"], ...] = ("md", "html", "json")
_SUFFIXES = {".md": "md", ".markdown": "md", ".html": "html", ".htm": "html", ".json": "json"}


def report(
    reference: ReferenceArgument,
    out: Annotated[
        Path | None, typer.Option("--out", help="Write to this file, whose ending tells the format. Default: stdout.")
    ] = None,
    format_: Annotated[
        str | None, typer.Option("--format", metavar="[md|html|json]", help="Default: --out's ending, else md.")
    ] = None,
    store: StoreOption = DEFAULT_STORE,
    json: JsonOption = False,
) -> int:
    """Write the report of an artifact again, with the channels and waivers of today.

    The report.json of the artifact is read and stays as it is. --json prints it with `standing`, whatever --out gets.
    """
    from compress import console
    from compress.artifacts.store import Store
    from compress.files import disk_errors, write_text
    from compress.steps.previous import read_artifact
    from compress.steps.standing import standing_at

    _check_kind(out)
    chosen = _format(format_ or ("json" if json and out is None else None), out)
    opened = Store(store)
    folder = opened.find(reference)
    _check_outside(out, folder, opened.root)
    read = read_artifact(folder)
    standing = standing_at(folder, read.artifact.name, read.artifact.version)
    text = _drawn(read, standing, chosen)
    if json or out is None:
        console.print_text(_drawn(read, standing, "json") if json else text)
    if out is None:
        return 0
    with disk_errors(out, "a place"):
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, text)
    if not json:
        console.print_line(str(out))
    return 0


def _drawn(read: Report, standing: Standing, chosen: str) -> str:
    from compress.reports.html import render_html
    from compress.reports.limits import limits
    from compress.reports.markdown import render_markdown

    if chosen == "html":
        return render_html(read, standing)
    if chosen == "md":
        return render_markdown(read, standing)
    dumped = read.model_dump(mode="json", by_alias=True)
    document = {**dumped, "limits": limits(read, standing), "standing": standing.to_json()}
    return json_.dumps(document, indent=2, ensure_ascii=False) + "\n"


def _format(asked: str | None, out: Path | None) -> Literal["md", "html", "json"]:
    from compress.errors import RecipeError, nearest

    chosen = asked or (_SUFFIXES.get(out.suffix.lower()) if out else "md")
    for known in FORMATS:
        if chosen == known:
            return known
    if chosen is None:
        raise RecipeError(f"--out {out}: its ending is none of {', '.join(_SUFFIXES)}; add --format md, html or json")
    raise RecipeError(f"--format {chosen}: give md, html or json.{nearest(chosen, FORMATS)}")


def _check_kind(out: Path | None) -> None:
    """Raises RecipeError for a folder, and for a place below a file."""
    from compress.errors import RecipeError

    if out is not None and out.is_dir():
        raise RecipeError(f"--out {out}: this is a folder; name a file")
    if out is not None and any(parent.exists() and not parent.is_dir() for parent in out.parents):
        raise RecipeError(f"--out {out}: a part of this path is a file; name another place")


def _check_outside(out: Path | None, folder: Path, store: Path) -> None:
    """Raises RecipeError for a place inside an artifact, whose files are pinned by its manifest, or in the store."""
    from compress.errors import RecipeError

    if out is None:
        return
    place = out.expanduser().resolve()
    if place.is_relative_to(folder.resolve()) or place.is_relative_to(store):
        raise RecipeError(f"--out {out}: lies inside the store, whose artifacts never change; name a place outside it")
