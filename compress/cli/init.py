"""`compress init`: a recipe to start from."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from compress.artifacts.layout import check_name
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

LONGEST_STEM = 48
"""Letters of the model's name in that of the artifact, which has at most 64."""


def init(
    path: Annotated[Path, typer.Argument(help="File to write.", metavar="RECIPE")] = Path("recipe.yaml"),
    model: Annotated[str, typer.Option(help="Hub id, folder or .gguf file.")] = "HuggingFaceTB/SmolLM2-135M-Instruct",
    name: Annotated[str, typer.Option(help="Name of the artifact; by default from the model.")] = "",
    calibration: Annotated[str, typer.Option(help="Calibration text.", show_default="python-help")] = "",
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

    local = Path(model).expanduser()
    _check(path, model, format_)
    if name:
        check_name(name)
    _check_size(group_size, format_)
    _check_texts(path, ("--calibration", calibration or "python-help"), ("--evaluation", evaluation))
    if calibration and format_ == "bitsandbytes":
        raise RecipeError("--calibration: rounding by bitsandbytes reads no text; leave it out")
    key = f"path: {_quoted(local.resolve())}" if local.exists() or model.endswith(".gguf") else f"hub: {_quoted(model)}"
    stem = Path(model).name.lower().removesuffix(".gguf")
    safe = re.sub("[^a-z0-9._-]", "-", stem)[:LONGEST_STEM].strip("._-")
    linears = _linears_of(local)
    stages, left = _stages(linears, format_, group_size)
    if linears is not None and len(left) == len(linears.shapes):
        raise RecipeError(f"--format {format_}: it holds none of this model's linears; choose another, or --group-size")
    longest = _context(local)
    window = min(512, longest)
    calibrated = CALIBRATION.format(text=calibration or "python-help", window=window)
    text = TEMPLATE.format(
        path=path,
        name=_quoted(name or f"{safe or 'model'}-{'nf4' if format_ == 'bitsandbytes' else 'int4'}"),
        model=key,
        calibration="" if format_ == "bitsandbytes" else calibrated,
        stages="\n".join(f"  - {{{stage}}}" for stage in stages),
        format=format_,
        evaluation=evaluation,
        window=window,
        context=min(4096, longest),
    )
    path.write_text(text, encoding="utf-8")
    if left:
        console.note(f"left in 16 bits, since {format_} cannot hold them: {', '.join(left)}")
    console.print_line(f"wrote {path}; next: compress plan {path}")
    return 0


def _check(path: Path, model: str, format_: str) -> None:
    """Raises RecipeError for a file that cannot be written anew, a model that is not there, an unknown format."""
    if format_ not in FORMATS:
        raise RecipeError(f"--format {format_}: unknown.{nearest(format_, FORMATS)} Formats: {', '.join(FORMATS)}")
    if path.exists():
        raise RecipeError(f"{path} exists already; choose another name.")
    if not path.parent.is_dir():
        raise RecipeError(f"{path}: the folder {path.parent} does not exist.")
    local = Path(model).expanduser()
    if not local.exists() and (model.startswith(("/", ".", "~")) or model.count("/") > 1):
        raise RecipeError(f"--model {model}: no such file or folder.")
    if local.is_dir() and not (local / "config.json").is_file():
        raise RecipeError(f"--model {model}: a folder without a config.json, so no model.")


def _check_texts(path: Path, *named: tuple[str, str]) -> None:
    """Raises RecipeError for (option, name) of texts that a recipe at `path` could not name."""
    from compress.calibration.texts import load_descriptor

    mistakes = []
    for option, name in named:
        try:
            load_descriptor(name, path.resolve().parent)
        except RecipeError as error:
            mistakes.append(f"{option}: {error}")
    if mistakes:
        raise RecipeError(mistakes)


def _quoted(value: object) -> str:
    """As YAML reads it back: plain where it can be."""
    import yaml

    return yaml.safe_dump(str(value), width=10**6).splitlines()[0]


def _check_size(group_size: str, format_: str) -> None:
    """Raises RecipeError for a group size that is none, or none of the format's."""
    if not group_size:
        return
    if format_ == "bitsandbytes":
        raise RecipeError("--group-size: bitsandbytes has blocks of 64 weights; leave it out")
    if group_size != "channel" and not (re.fullmatch("[0-9]{1,9}", group_size) and int(group_size) > 1):
        raise RecipeError(f"--group-size {group_size}: give a number of columns, such as 64, or channel")
    if format_ == "gguf" and group_size != "channel" and int(group_size) % 32:
        raise RecipeError(f"--group-size {group_size}: gguf has blocks of 32 columns; give a multiple, or channel")


def _context(folder: Path) -> int:
    """Tokens that a model in a folder takes, by its config; where nothing tells, as many as any."""
    import json

    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return int(config.get("max_position_embeddings") or config.get("n_positions") or 4096)
    except (OSError, ValueError, TypeError, AttributeError):
        return 4096


OTHER_SIZES = {"compressed-tensors": ("32", "128", "channel"), "plain": ("32", "128", "channel"), "gguf": ("32",)}
"""Group sizes to fall back on, by format, for linears that do not divide into those of the rest."""
PRODUCTS = "products: auto"
"""Less time where the processor has units for bfloat16; what it is without them."""


@dataclass(frozen=True)
class _Linears:
    """Shapes (rows, columns) of a block's linears by their names in it, those that runtimes fuse, the embedding's."""

    shapes: dict[str, tuple[int, int]]
    fused: tuple[tuple[str, ...], ...]
    embedding: tuple[int, int]

    def pattern(self, name: str) -> str:
        """What matches a linear in every block and no other."""
        leaf = name.rsplit(".", 1)[-1]
        alone = [each.rsplit(".", 1)[-1] for each in self.shapes].count(leaf) == 1
        return f'"*.{leaf if alone else name}"'

    def sizes(self, format_: str, tried: list[str]) -> dict[str, str | None]:
        """For each linear the first of the group sizes that the format holds it in, the same where runtimes fuse them;
        None where it holds it in none."""
        together = {name: group for group in self.fused for name in group}
        return {
            name: _first_held(format_, tried, [self.shapes[each] for each in together.get(name, (name,))])
            for name in self.shapes
        }


def _first_held(format_: str, tried: list[str], shapes: list[tuple[int, int]]) -> str | None:
    """The first of the group sizes in which a format holds matrices of all shapes, in 4 bits as `_stages` has them."""
    from compress.checkpoints.formats import FORMATS
    from compress.quantization.scheme import Scheme

    for size in tried:
        if format_ == "bitsandbytes":
            scheme = Scheme(4, group_size=int(size), grid="nf4", nested=True)
        else:
            gguf = format_ == "gguf"
            scheme = Scheme(4, not gguf, None if size == "channel" else int(size), free_minima=gguf)
        if all(
            scheme.divides(columns) and not FORMATS[format_].refusal(scheme, rows, columns) for rows, columns in shapes
        ):
            return size
    return None


def _stages(linears: _Linears | None, format_: str, group_size: str) -> tuple[list[str], list[str]]:
    """Stages of 4 bits as the format has them, each without its braces, and what they leave out. `linears`: None where
    nothing tells."""
    if format_ == "bitsandbytes":
        said, left = _exceptions(linears, format_, ["64"])
        return ["kind: bitsandbytes, type: nf4" + said], left
    size = group_size or ("32" if format_ == "gguf" else "64")
    if format_ == "gptq" and not group_size and linears:
        # One size for the whole model: that which leaves the fewest out.
        size = min(("64", "32"), key=lambda each: [*linears.sizes(format_, [each]).values()].count(None))
    tried = [size, *(each for each in OTHER_SIZES.get(format_, ()) if each != size)]
    exceptions, left = _exceptions(linears, format_, tried)
    if format_ != "gguf":
        return [f"kind: gptq, bits: 4, group_size: {size}, {PRODUCTS}{exceptions}"], left
    columns = [shape[1] for shape in (*linears.shapes.values(), linears.embedding)] if linears else []
    if columns and not group_size and all(width % 256 == 0 for width in columns):
        return ["kind: vocabulary, bits: 6, k_quant: true", f"kind: gptq, bits: 4, k_quant: true, {PRODUCTS}"], []
    held = _first_held(format_, tried, [linears.embedding]) if linears else size
    stages = [f"kind: vocabulary, bits: 8, group_size: {held}"] if held else []
    grid = f"group_size: {size}, symmetric: false, zero_points: free"
    return [*stages, f"kind: gptq, bits: 4, {grid}, {PRODUCTS}{exceptions}"], left


def _exceptions(linears: _Linears | None, format_: str, tried: list[str]) -> tuple[str, list[str]]:
    """Other group sizes, and linears that the format cannot hold, as they are written behind a stage; those linears."""
    found = {} if linears is None else linears.sizes(format_, tried)
    if linears is None or set(found.values()) <= {tried[0]}:
        return "", []
    others = [
        f"{{match: {linears.pattern(name)}, group_size: {size}}}"
        for name, size in found.items()
        if size and size != tried[0]
    ]
    left = [linears.pattern(name) for name, size in found.items() if size is None]
    said = f", overrides: [{', '.join(others)}]" if others else ""
    return said + (f", ignore: [{', '.join(left)}]" if left else ""), left


def _linears_of(folder: Path) -> _Linears | None:
    """What a model in a folder has; None where nothing tells."""
    if not (folder / "config.json").is_file():
        return None
    import torch

    from compress.checkpoints.reader import Checkpoint
    from compress.checkpoints.skeleton import Skeleton
    from compress.errors import CompressError

    try:
        skeleton = Skeleton(Checkpoint(folder).config, torch.device("cpu"), torch.float32)
        shapes, architecture = skeleton.linear_shapes(), skeleton.architecture
        first = f"{architecture.block_name(0)}."
        inside = {name.removeprefix(first): shape for name, shape in shapes.items() if name.startswith(first)}
        embedding = tuple(skeleton.parameter_shapes()[f"{architecture.embedding}.weight"])
    except (CompressError, OSError, ValueError, LookupError, TypeError, AttributeError):
        return None  # `plan` tells what is wrong with it
    return _Linears(inside, architecture.fused, (embedding[0], embedding[1]))
