"""`compress frontier`: quality against bytes before a budget is chosen."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from compress.cli.options import JsonOption, RecipeArgument, SetOption, quiet_libraries


def frontier(
    recipe: RecipeArgument,
    points: Annotated[int, typer.Option("--points", min=1, max=64, help="Budgets to try, evenly apart.")] = 8,
    bits: Annotated[
        str | None, typer.Option("--bits", help="Effective bits to try instead, e.g. --bits 3.5,4,4.5.")
    ] = None,
    max_kl: Annotated[
        float | None,
        typer.Option("--max-kl", help="Look for the smallest mixture whose mean KL on tuning text is at most this."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for frontier.json and frontier.html.")] = None,
    set_: SetOption = None,
    json: JsonOption = False,
) -> int:
    """Measure mixtures of the recipe's candidates at a range of budgets, beside uniform schemes.

    Reads calibration text only: the data of the gates stays untouched. What was computed is kept for the next run.
    """
    from compress import console
    from compress.recipe import load_recipe

    asked = _bits(bits)
    _check(max_kl)
    _check_folder(out)
    loaded = load_recipe(recipe, tuple(set_ or ()))
    quiet_libraries()
    from compress.checkpoints.sources import cache_folder
    from compress.files import A_CACHE, disk_errors, write_json
    from compress.reports.frontier import frontier_page, frontier_table, sentence
    from compress.steps.frontier import frontier as measure
    from compress.steps.plan import make_plan

    progress = console.StageProgress()
    with disk_errors(cache_folder(), A_CACHE):
        found = measure(make_plan(loaded, None, progress), asked, points, max_kl, progress).to_json()
    if out is not None:
        with disk_errors(out, "a place"):
            out.mkdir(parents=True, exist_ok=True)
            write_json(out / "frontier.json", found)
            (out / "frontier.html").write_text(frontier_page(found), encoding="utf-8")
    if json:
        console.print_json(found)
        return 0
    table = frontier_table(found["points"])
    console.print_table(
        f"{found['name']}: mean KL on {found['tuning_tokens']:,} tuning tokens", table.headers, table.rows
    )
    if max_kl is not None:
        console.print_line(sentence(found))
    if out is not None:
        console.print_line(f"page: {out / 'frontier.html'}")
    return 0


def _bits(text: str | None) -> list[float] | None:
    from compress.errors import RecipeError

    if text is None:
        return None
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        raise RecipeError(f"--bits {text}: numbers with commas between them, e.g. --bits 3.5,4,4.5") from None
    if not all(0 < value <= 32 for value in found):
        raise RecipeError(f"--bits {text}: each is above 0 and at most 32")
    return found


def _check_folder(out: Path | None) -> None:
    """Before minutes of work: --out must be a folder, or become one."""
    from compress.errors import RecipeError

    if out is not None and any(place.exists() and not place.is_dir() for place in (out, *out.parents)):
        raise RecipeError(f"--out {out}: this, or a part of it, is a file; name a folder")


def _check(max_kl: float | None) -> None:
    from compress.errors import RecipeError

    if max_kl is not None and not 0 < max_kl < float("inf"):
        raise RecipeError(f"--max-kl {max_kl:g}: a bound in nats, above 0")
