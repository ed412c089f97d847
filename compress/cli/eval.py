"""`compress eval`: judge a model that is there already by a recipe's gates."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from compress.cli.options import DEFAULT_STORE, JsonOption, SetOption, StoreOption, quiet_libraries
from compress.cli.outputs import GithubOption, JunitOption, Outputs

Model = Annotated[
    str, typer.Argument(help="NAME, NAME@v0003 or NAME@r0001 of the store, a folder, a .gguf file or a hub id.")
]


def eval_(
    model: Model,
    recipe: Annotated[Path, typer.Option("--recipe", help="The recipe whose evaluation and gates are used.")],
    against: Annotated[
        str | None,
        typer.Option("--against", metavar="MODEL", help="Compare with this model instead of the recipe's source."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="New or empty folder for the report.")] = None,
    store: StoreOption = DEFAULT_STORE,
    set_: SetOption = None,
    json: JsonOption = False,
    junit: JunitOption = None,
    github: GithubOption = False,
) -> int:
    """Judge any model by a recipe's gates: a previous release, a rejected run, what another tool made.

    Nothing is compressed or published; stages of the recipe are not run. Exit codes are those of `compress run`.
    """
    from compress import console
    from compress.cli.run import print_outcome
    from compress.recipe import load_recipe

    loaded = load_recipe(recipe, tuple(set_ or ()), judging=True)
    quiet_libraries()
    from compress.pipeline import evaluate
    from compress.steps.candidate import Asked, find_model

    if out is not None:
        _check_empty(out)
    outputs = Outputs(junit, github)
    asked = Asked(find_model(model, store), find_model(against, store) if against is not None else None)
    outcome = evaluate(loaded, asked, out, console.StageProgress())
    if json:
        console.print_json(outcome.report.model_dump(mode="json", by_alias=True))
    else:
        print_outcome(outcome)
    outputs.write(outcome.report, outcome.html)
    return int(outcome.exit_code)


def _check_empty(out: Path) -> None:
    """Raises RecipeError for a folder that holds something: a report is never written over another."""
    from compress.errors import RecipeError

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RecipeError(f"--out {out}: exists and is not an empty folder; name a new one.")
