"""`compress init`, `validate`, `kinds` and `schema`: writing recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel

from compress.cli.options import JsonOption, RecipeArgument, SetOption
from compress.errors import RecipeError

TEMPLATE = """\
# Made by `compress init`. Check it with `compress plan {path}`, run it with `compress run {path}`.
schema: 1
name: {name}
seed: 0
model:
  {model}
# self_generated_windows are sampled from the model itself, which is held in memory for that; 0 leaves them out.
calibration: {{data: {calibration}, windows: 64, window_tokens: {window}, self_generated_windows: 64}}
stages:
  - {{kind: gptq, bits: 4, group_size: {group_size}{overrides}}}
export: {{format: compressed-tensors, context: {context}, concurrency: 8}}
evaluation:
  - {{kind: perplexity, data: {evaluation}, windows: 32, window_tokens: {window}}}
  - {{kind: divergence, data: {evaluation}, windows: 32, window_tokens: {window}}}
gates:
  - {{kind: relative, measure: perplexity.{evaluation}, max_ratio: 1.05}}
  - {{kind: threshold, measure: divergence.{evaluation}.mean_kl, max: 0.1}}
  - {{kind: events, event: rounding_fallback, max: 0}}
"""


def init(
    path: Annotated[Path, typer.Argument(help="File to write.", metavar="RECIPE")] = Path("recipe.yaml"),
    model: Annotated[str, typer.Option(help="Hub id, folder or .gguf file.")] = "HuggingFaceTB/SmolLM2-135M-Instruct",
    name: Annotated[str, typer.Option(help="Name of the artifact; by default from the model.")] = "",
    calibration: Annotated[str, typer.Option(help="Calibration text.")] = "python-help",
    evaluation: Annotated[str, typer.Option(help="Held-out text.")] = "python-docstrings",
    group_size: Annotated[str, typer.Option(help="Columns that share a scale, or channel.")] = "64",
) -> int:
    """Write a recipe to start from. Never overwrites a file."""
    from compress import console

    if path.exists():
        raise RecipeError(f"{path} exists already; choose another name.")
    if not path.parent.is_dir():
        raise RecipeError(f"{path}: the folder {path.parent} does not exist.")
    local = Path(model).expanduser()
    key = f"path: {local.resolve()}" if local.exists() or model.endswith(".gguf") else f"hub: {model}"
    stem = Path(model).name.lower().removesuffix(".gguf")
    safe = "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in stem).strip("._-")
    longest = _context(local)
    text = TEMPLATE.format(
        path=path,
        name=name or f"{safe or 'model'}-int4",
        model=key,
        calibration=calibration,
        evaluation=evaluation,
        group_size=group_size,
        overrides=_overrides(local, group_size),
        window=min(512, longest),
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


SERVED_SIZES = (32, 128)
"""Group sizes that serving runtimes take, to fall back on; after them a scale a row."""


def _overrides(folder: Path, group_size: str) -> str:
    """Of a model in a folder, another group size for the kinds of linear whose columns do not divide into groups of
    `group_size`, as it is written behind it; nothing where nothing tells, which `plan` will."""
    if not group_size.isdigit() or int(group_size) < 1 or not (folder / "config.json").is_file():
        return ""
    import torch

    from compress.checkpoints.reader import Checkpoint
    from compress.checkpoints.skeleton import Skeleton
    from compress.errors import CompressError

    try:
        config = Checkpoint(folder).config
        shapes = Skeleton(config, torch.device("cpu"), torch.float32).linear_shapes()
    except (CompressError, OSError, ValueError, KeyError):
        return ""
    found: dict[str, str] = {}
    for module, (_, columns) in shapes.items():
        if columns % int(group_size):
            size = next((str(size) for size in SERVED_SIZES if columns % size == 0), "channel")
            found[module.rsplit(".", 1)[-1]] = size
    each = ", ".join(f'{{match: "*.{leaf}", group_size: {size}}}' for leaf, size in found.items())
    return f", overrides: [{each}]" if each else ""


def validate(recipe: RecipeArgument, set_: SetOption = None, json: JsonOption = False) -> int:
    """Check a recipe without looking at the model: keys, values, texts, gates. All mistakes at once."""
    from compress import console
    from compress.recipe import load_recipe

    loaded = load_recipe(recipe, tuple(set_ or ()))
    if json:
        console.print_json(loaded.model_dump(mode="json", by_alias=True))
    else:
        console.print_line(
            f"{recipe}: a valid recipe. `compress plan {recipe}` checks it against the model and machine."
        )
    return 0


def kinds(
    kind: Annotated[str | None, typer.Argument(help="Show only this one.", metavar="KIND")] = None,
    json: JsonOption = False,
) -> int:
    """List stages, gates, evaluations, texts, formats and events, with their fields."""
    from compress import console

    catalogue = _catalogue()
    if kind is not None:
        from compress.errors import nearest

        names = [name for entries in catalogue.values() for name in entries]
        if kind not in names:
            raise RecipeError(f"no kind is called {kind!r}.{nearest(kind, names)} Known: {', '.join(names)}")
        catalogue = {
            group: {name: entry for name, entry in entries.items() if name == kind}
            for group, entries in catalogue.items()
            if kind in entries
        }
    if json:
        console.print_json(catalogue)
        return 0
    for group, entries in catalogue.items():
        console.print_line(group)
        for name, entry in entries.items():
            console.print_line(f"  {name}: {entry['description']}")
            for field, text in entry.get("fields", {}).items():
                console.print_line(f"      {field}: {text}")
        console.print_line()
    return 0


def _catalogue() -> dict[str, dict[str, Any]]:
    from compress.calibration.texts import known_descriptors, load_descriptor
    from compress.checkpoints.formats import FORMATS
    from compress.evaluation.specs import EVALUATIONS
    from compress.events import EVENT_KINDS
    from compress.gates import GATES
    from compress.recipe import ALWAYS_MEASURED
    from compress.stages import STAGES

    groups: dict[str, dict[str, Any]] = {}
    for group, registry in (("stages", STAGES), ("evaluation", EVALUATIONS), ("gates", GATES)):
        groups[group] = {name: _model(model) for name, model in registry.items()}
    groups["texts"] = {
        name: {"description": load_descriptor(name, Path.cwd())[0].description}
        for name in known_descriptors(Path.cwd())
    }
    groups["formats"] = {name: {"description": format_.description} for name, format_ in FORMATS.items()}
    groups["measures of every run"] = {name: {"description": "measured by every run"} for name in ALWAYS_MEASURED}
    groups["events"] = {name: {"description": text} for name, text in EVENT_KINDS.items()}
    return groups


def _model(model: Any) -> dict[str, Any]:
    """Docstring and fields of a config, with defaults."""
    schema = model.model_json_schema()
    fields = {}
    for name, field in model.model_fields.items():
        if name == "kind":
            continue
        default = (
            "required" if field.is_required() else f"default {_shown(field.get_default(call_default_factory=True))}"
        )
        kind = _type(schema["properties"][name])
        fields[name] = f"{field.description or ''} ({kind}; {default})".strip()
    return {"description": " ".join((model.__doc__ or "").split()), "fields": fields}


def _shown(value: Any) -> str:
    if isinstance(value, tuple) and value and all(isinstance(each, BaseModel) for each in value):
        return str([each.model_dump(mode="json", exclude_defaults=True) for each in value])
    return "[]" if value == () else "none" if value is None else "''" if value == "" else str(value)


def _type(schema: dict[str, Any]) -> str:
    if "enum" in schema:
        return " | ".join(str(value) for value in schema["enum"])
    if "const" in schema:
        return str(schema["const"])
    if "anyOf" in schema:
        return " | ".join(dict.fromkeys(_type(option) for option in schema["anyOf"] if option.get("type") != "null"))
    if "$ref" in schema:
        return str(schema["$ref"].rsplit("/", 1)[1])
    return str(schema.get("type", "object"))


def schema() -> int:
    """Print the JSON schema of recipes, for editors (yaml-language-server: $schema=...)."""
    from compress import console
    from compress.recipe import json_schema

    console.print_json(json_schema())
    return 0
