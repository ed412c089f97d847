"""`compress init`: a recipe to start from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from compress.errors import RecipeError, nearest

TEMPLATE = """\
# Made by `compress init`. Check it with `compress plan {path}`, run it with `compress run {path}`.
schema: 1
name: {name}
seed: 0
model:
  {model}
{calibration}stages:
{stages}
export: {{format: {format}, context: {context}, concurrency: 8}}
evaluation:
  - {{kind: perplexity, data: {evaluation}, windows: 32, window_tokens: {window}}}
  - {{kind: divergence, data: {evaluation}, windows: 32, window_tokens: {window}}}
gates:
  - {{kind: relative, measure: perplexity.{evaluation}, max_ratio: 1.05}}
  - {{kind: threshold, measure: divergence.{evaluation}.mean_kl, max: 0.1}}
  - {{kind: events, event: rounding_fallback, max: 0}}
"""
CALIBRATION = """\
# self_generated_windows are sampled from the model itself, which is held in memory for that; 0 leaves them out.
calibration: {{data: {text}, windows: 64, window_tokens: {window}, self_generated_windows: 64}}
"""
FORMATS = ("compressed-tensors", "gptq", "gguf", "bitsandbytes", "plain")
"""Names of `checkpoints.formats`, without the libraries that writing them takes."""


def init(
    path: Annotated[Path, typer.Argument(help="File to write.", metavar="RECIPE")] = Path("recipe.yaml"),
    model: Annotated[str, typer.Option(help="Hub id, folder or .gguf file.")] = "HuggingFaceTB/SmolLM2-135M-Instruct",
    name: Annotated[str, typer.Option(help="Name of the artifact; by default from the model.")] = "",
    calibration: Annotated[str, typer.Option(help="Calibration text.")] = "python-help",
    evaluation: Annotated[str, typer.Option(help="Held-out text.")] = "python-docstrings",
    group_size: Annotated[
        str, typer.Option(help="Columns that share a scale, or channel.", show_default="64; gguf: 32, or K-quants")
    ] = "",
    format_: Annotated[str, typer.Option("--format", help=f"Format of the artifact: {', '.join(FORMATS)}.")] = FORMATS[
        0
    ],
) -> int:
    """Write a recipe to start from. Never overwrites a file."""
    from compress import console

    if format_ not in FORMATS:
        raise RecipeError(f"--format {format_}: unknown.{nearest(format_, FORMATS)} Formats: {', '.join(FORMATS)}")
    if group_size and format_ == "bitsandbytes":
        raise RecipeError("--group-size: bitsandbytes has blocks of 64 weights; leave it out")
    if path.exists():
        raise RecipeError(f"{path} exists already; choose another name.")
    if not path.parent.is_dir():
        raise RecipeError(f"{path}: the folder {path.parent} does not exist.")
    local = Path(model).expanduser()
    key = f"path: {local.resolve()}" if local.exists() or model.endswith(".gguf") else f"hub: {model}"
    stem = Path(model).name.lower().removesuffix(".gguf")
    safe = "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in stem).strip("._-")
    longest = _context(local)
    window = min(512, longest)
    # Rounding by bitsandbytes reads no text.
    calibrated = "" if format_ == "bitsandbytes" else CALIBRATION.format(text=calibration, window=window)
    text = TEMPLATE.format(
        path=path,
        name=name or f"{safe or 'model'}-{'nf4' if format_ == 'bitsandbytes' else 'int4'}",
        model=key,
        calibration=calibrated,
        stages="\n".join(f"  - {{{stage}}}" for stage in _stages(_linear_shapes(local), format_, group_size)),
        format=format_,
        evaluation=evaluation,
        window=window,
        context=min(4096, longest),
    )
    path.write_text(text, encoding="utf-8")
    console.print_line(f"wrote {path}; next: compress plan {path}")
    return 0


def _context(folder: Path) -> int:
    """Tokens that a model in a folder takes, by its config; where nothing tells, as many as any."""
    import json

    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return int(config.get("max_position_embeddings") or config.get("n_positions") or 4096)
    except (OSError, ValueError, TypeError, AttributeError):
        return 4096


Shapes = dict[str, tuple[int, int]]
SERVED_SIZES = (32, 128)
"""Group sizes that serving runtimes take, to fall back on; after them a scale a row."""


def _stages(shapes: Shapes, format_: str, group_size: str) -> list[str]:
    """Stages of 4 bits as the format has them, each without its braces. `shapes`: of a block's linears, by name in the
    block; empty where nothing tells."""
    if format_ == "bitsandbytes":
        return ["kind: bitsandbytes, type: nf4" + _left_out(shapes, format_, 64)]
    size = group_size or ("32" if format_ == "gguf" else "64")
    number = int(size) if size.isdigit() and int(size) > 0 else 1
    if format_ in ("compressed-tensors", "plain"):
        return [f"kind: gptq, bits: 4, group_size: {size}{_other_sizes(shapes, number)}"]
    if format_ == "gptq":
        return [f"kind: gptq, bits: 4, group_size: {size}{_left_out(shapes, format_, number)}"]
    if shapes and not group_size and all(columns % 256 == 0 for _, columns in shapes.values()):
        return ["kind: vocabulary, bits: 6, k_quant: true", "kind: gptq, bits: 4, k_quant: true"]
    grid = f"symmetric: false, zero_points: free{_left_out(shapes, format_, number)}"
    return [f"kind: vocabulary, bits: 8, group_size: {size}", f"kind: gptq, bits: 4, group_size: {size}, {grid}"]


def _other_sizes(shapes: Shapes, group_size: int) -> str:
    """Overrides with another group size for linears whose columns do not divide, as it is written behind a stage."""
    found = {
        leaf: next((str(size) for size in SERVED_SIZES if columns % size == 0), "channel")
        for leaf, (_, columns) in shapes.items()
        if columns % group_size
    }
    each = ", ".join(f'{{match: "*.{leaf}", group_size: {size}}}' for leaf, size in found.items())
    return f", overrides: [{each}]" if each else ""


def _left_out(shapes: Shapes, format_: str, group_size: int) -> str:
    """Linears that the format cannot hold in such groups, as it is written behind a stage."""

    def held(rows: int, columns: int) -> bool:
        # GPTQ's loaders have kernels for multiples of 32 only (checkpoints.formats.gptq).
        return columns % group_size == 0 and (format_ != "gptq" or rows % 32 == columns % 32 == 0)

    names = [f'"*.{leaf}"' for leaf, shape in shapes.items() if not held(*shape)]
    return f", ignore: [{', '.join(names)}]" if names else ""


def _linear_shapes(folder: Path) -> Shapes:
    """Shapes (rows, columns) of a block's linears of a model in a folder, by the last part of their names; none where
    nothing tells."""
    if not (folder / "config.json").is_file():
        return {}
    import torch

    from compress.checkpoints.reader import Checkpoint
    from compress.checkpoints.skeleton import Skeleton
    from compress.errors import CompressError

    try:
        shapes = Skeleton(Checkpoint(folder).config, torch.device("cpu"), torch.float32).linear_shapes()
    except (CompressError, OSError, ValueError, KeyError):
        return {}
    return {name.rsplit(".", 1)[-1]: shape for name, shape in shapes.items()}
