"""Write the token windows of a recipe, so that other quantisers get exactly the same ones.

    python scripts/benchmarks/windows.py scripts/benchmarks/w4g64.yaml OUT_DIR

Writes OUT_DIR/calibration.safetensors and OUT_DIR/<set>.safetensors (`input_ids`, int64 (windows, tokens)), and prints
the folder of the source model, which peers.py takes as --model.
"""

from __future__ import annotations

import sys
from pathlib import Path

from safetensors.torch import save_file

from compress.console import StageProgress
from compress.recipe import load_recipe
from compress.steps.environment import choose_machine
from compress.steps.source import open_source
from compress.steps.texts import read_texts


def main(recipe_path: Path, folder: Path) -> None:
    """Build the windows as `compress run` would, and write them."""
    recipe, progress = load_recipe(recipe_path), StageProgress()
    source = open_source(recipe.model, progress)
    texts = read_texts(recipe, source, choose_machine("cpu", source.checkpoint.config), progress)
    folder.mkdir(parents=True, exist_ok=True)
    windows = dict(texts.evaluation)
    if texts.calibration is not None:
        windows["calibration"] = texts.calibration
    for name, value in windows.items():
        save_file({"input_ids": value.ids}, folder / f"{name}.safetensors", {"digest": value.digest})
    print(source.source.folder)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
