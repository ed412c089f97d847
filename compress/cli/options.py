"""Options that several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

StoreOption = Annotated[
    Path,
    typer.Option("--store", envvar="COMPRESS_STORE", help="Folder of the artifacts.", show_default="artifacts"),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PATH=VALUE", help="Override one value of the recipe, e.g. --set stages.0.bits=3."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
RecipeArgument = Annotated[Path, typer.Argument(help="The recipe, a YAML file.", metavar="RECIPE")]
ReferenceArgument = Annotated[
    str, typer.Argument(help="NAME (newest version), NAME@v0003, NAME@r0001 or a folder.", metavar="ARTIFACT")
]
DEFAULT_STORE = Path("artifacts")


def quiet_libraries() -> None:
    """Keep other libraries' progress bars and warnings off the screen; ours says what matters."""
    import logging

    logging.getLogger("transformers").setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    try:
        from loguru import logger
    except ImportError:
        return
    logger.disable("compressed_tensors")
