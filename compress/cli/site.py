"""`compress site`: the store as static pages."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from compress.cli.options import JsonOption


def site(
    store: Annotated[Path, typer.Argument(help="Folder of the artifacts.", metavar="STORE")],
    out: Annotated[Path, typer.Option("--out", help="New or empty folder, or a site made before.")],
    title: Annotated[str, typer.Option("--title", help="Heading of the index.")] = "Models",
    json: JsonOption = False,
) -> int:
    """Write static pages of all models: versions, verdicts, channels, sizes, quality against bytes, every report.

    The pages need no server and no scripts; they hold copies of the reports, drawn today.
    """
    from compress import console
    from compress.artifacts.store import Store
    from compress.errors import RecipeError
    from compress.steps.site import check_place, shelves_of, write_site

    if not store.is_dir():
        raise RecipeError(f"{store}: no such folder; name a store, e.g. artifacts")
    opened = Store(store)
    place = out.expanduser().resolve()
    check_place(place, opened)
    document = write_site(shelves_of(opened, console.StageProgress()), title, place)
    if json:
        console.print_json(document)
        return 0
    versions = [version for model in document["models"] for version in model["versions"]]
    for model in document["models"]:
        for version in model["versions"]:
            if version["problem"]:
                console.note(f"{model['name']}@{version['version']}: {version['problem']}")
    console.print_line(f"{len(document['models'])} models, {len(versions)} versions: {place / 'index.html'}")
    return 0
