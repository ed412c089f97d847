"""`compress validate`, `kinds` and `schema`: what a recipe may say."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel

from compress.cli.options import JsonOption, RecipeArgument, SetOption
from compress.errors import RecipeError


def validate(recipe: RecipeArgument, set_: SetOption = None, json: JsonOption = False) -> int:
    """Check a recipe without looking at the model: keys, values, texts, gates. Mistakes come together: of keys
    and values first, once those are right of texts and measures."""
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
    groups["measures of every run"] = {
        name: {"description": "of every run" + (" with a round trip" if name.startswith("round_trip") else "")}
        for name in ALWAYS_MEASURED
    }
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
