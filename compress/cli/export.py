"""`compress export`: another door from a published artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from compress.cli.options import DEFAULT_STORE, JsonOption, ReferenceArgument, StoreOption, quiet_libraries
from compress.cli.outputs import GithubOption, JunitOption, Outputs


def export(
    reference: ReferenceArgument,
    format_: Annotated[str, typer.Option("--format", help="Format to write; `compress kinds` lists them.")],
    store: StoreOption = DEFAULT_STORE,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="PATH=VALUE", help="Override a value under export, e.g. export.context=8192."),
    ] = None,
    json: JsonOption = False,
    junit: JunitOption = None,
    github: GithubOption = False,
) -> int:
    """Write a published artifact in another format, judge that, and publish it as a new version.

    The integers stay the same; the new version remembers the one it came from. It is judged by the same recipe as that
    was, so the source model is needed. Exit codes are those of `compress run`.
    """
    from compress import console
    from compress.errors import RecipeError, nearest
    from compress.recipe import load_recipe

    overrides = tuple(set_ or ())
    strangers = [each for each in overrides if not each.startswith("export.")]
    if strangers:
        raise RecipeError(f"--set {strangers[0]}: only values under export can change; the codes are there already")
    quiet_libraries()
    from compress.checkpoints.formats import FORMATS
    from compress.cli.run import print_outcome
    from compress.pipeline import run as run_plan
    from compress.steps.parent import open_parent, plan_export

    if format_ not in FORMATS:
        raise RecipeError(f"--format {format_}: unknown.{nearest(format_, FORMATS)} Formats: {', '.join(FORMATS)}")
    parent = open_parent(reference, store)
    path = Path(parent.artifact.path) / "recipe.yaml"
    recipe = load_recipe(path, (f"export.format={format_}", *overrides))
    if recipe.export == parent.recipe.export:
        raise RecipeError(f"{parent.reference} is in the format {format_} already")
    progress = console.StageProgress()
    planned = plan_export(recipe, parent, store, progress)
    console.note(f"plan: {console.bytes_text(planned.stored_bytes)} stored, from {parent.reference}")
    outcome = run_plan(planned, store, progress, parent)
    if json:
        console.print_json(outcome.report.model_dump(mode="json", by_alias=True))
    else:
        print_outcome(outcome)
    Outputs(junit, github).write(outcome.report, outcome.html)
    return int(outcome.exit_code)
