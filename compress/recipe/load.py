"""From a file to a recipe: read, overridden, checked, and with every path absolute."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from compress.calibration.texts import OWN_DESCRIPTORS, FilesText
from compress.errors import RecipeError, nearest
from compress.evaluation.prompts.spec import Prompts
from compress.evaluation.specs import AnyEvaluation, OnText
from compress.evaluation.tasks.spec import Task
from compress.recipe.bounds import with_bounds
from compress.recipe.checks import cross_check
from compress.recipe.model import Recipe
from compress.recipe_errors import Lines, describe, parse_yaml
from compress.stages.presets import forget_grid, forget_quality, written_out


def load_recipe(path: Path, overrides: tuple[str, ...] = (), *, judging: bool = False) -> Recipe:
    """Read, override and check a recipe; relative paths become absolute. Raises RecipeError with every mistake.

    judging: only its evaluation and gates will be used, so its calibration text need not be at hand.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except IsADirectoryError:
        raise RecipeError(f"{path}: a folder; name the recipe in it") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: cannot be read as text in UTF-8 (byte {error.start})") from None
    except FileNotFoundError:
        near = nearest(path.name, [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else [])
        raise RecipeError(f"{path}: no such recipe.{near}") from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error}).") from error
    data, lines = parse_yaml(text, path)
    for override in overrides:
        _override(data, override, lines)
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        raise RecipeError(describe(error, data, lines, Recipe.model_json_schema(by_alias=True))) from error
    mistakes = cross_check(recipe, path.resolve().parent, lines, judging)
    if mistakes:
        raise RecipeError(mistakes)
    recipe = with_bounds(recipe.with_implied(written_out(recipe.stages)))
    return _absolute(recipe, path.resolve().parent)


def _override(data: Any, override: str, lines: Lines) -> None:
    """Apply one `--set stages.0.bits=3`; the value is read as YAML."""
    path, separator, text = override.partition("=")
    if not separator or not path:
        raise RecipeError(f"--set {override}: write it as path=value, e.g. --set stages.0.bits=3")
    keys = re.sub(r"\[(\d+)\]", r".\1", path).split(".")
    place = data
    for position, key in enumerate(keys):
        last = position == len(keys) - 1
        if isinstance(place, list):
            if not key.isdigit() or int(key) >= len(place):
                raise RecipeError(f"--set {override}: {'.'.join(keys[:position])} has entries 0 to {len(place) - 1}")
            index: Any = int(key)
        elif isinstance(place, dict):
            index = key
            if not last:
                place.setdefault(key, {})
        else:
            raise RecipeError(f"--set {override}: {'.'.join(keys[:position])} is a single value, it has no {key!r}")
        if last:
            try:
                place[index] = yaml.safe_load(text)
                if index == "quality":
                    forget_quality(place)
                if index == "k_quant":
                    forget_grid(place)
            except yaml.YAMLError as error:
                raise RecipeError(f"--set {override}: the value is not YAML ({error}).") from error
            lines.mark_override(tuple(int(key) if key.isdigit() else key for key in keys), override)
        else:
            place = place[index]


def _absolute(recipe: Recipe, base: Path) -> Recipe:
    """Relative paths resolved against the recipe's folder, so that the stored recipe runs from anywhere."""
    updates: dict[str, Any] = {}
    if recipe.model.path is not None:
        path = (base / recipe.model.path.expanduser()).resolve()
        updates["model"] = recipe.model.model_copy(update={"path": path})
    if recipe.calibration is not None:
        updates["calibration"] = _absolute_text(recipe.calibration, base)
    updates["evaluation"] = tuple(_absolute_evaluation(spec, base) for spec in recipe.evaluation)
    return recipe.model_copy(update=updates)


def _absolute_evaluation(spec: AnyEvaluation, base: Path) -> Any:
    if isinstance(spec, Task | Prompts):
        return spec.absolute(base)
    return _absolute_text(spec, base) if isinstance(spec, OnText) else spec


def _absolute_text(spec: Any, base: Path) -> Any:
    """Texts described outside the project are written out, so that the recipe no longer depends on where it lies."""
    descriptor, folder = spec.descriptor(base)
    named = isinstance(spec.data, str)
    if named and folder == OWN_DESCRIPTORS and not isinstance(descriptor.source, FilesText):
        return spec
    source = descriptor.source
    if isinstance(source, FilesText):
        source = source.model_copy(
            update={"paths": tuple(str((folder / Path(path).expanduser()).resolve()) for path in source.paths)}
        )
    update: dict[str, Any] = {"data": source}
    if named:
        update["data"] = source.model_copy(update={"name": spec.data, "licence": descriptor.licence})
        if hasattr(spec, "set") and not spec.set:
            update["set"] = spec.data
    return spec.model_copy(update=update)
