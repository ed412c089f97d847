"""A version that another one is made from: the same codes, behind another door."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from compress.artifacts import manifest
from compress.artifacts.store import Store
from compress.checkpoints.formats import FORMATS
from compress.checkpoints.reader import Checkpoint
from compress.errors import CompressError, RecipeError
from compress.events import OF_FILES, OF_MAKING, Event, Progress
from compress.memory import predict
from compress.recipe import Recipe, load_recipe
from compress.reports.report import ArtifactRef, StageRecord
from compress.steps.checks import format_mistakes
from compress.steps.plan import Plan, kv_bytes, make_plan
from compress.steps.shapes import Shape


@dataclass(frozen=True)
class Parent:
    """A version of the store, opened. `events` are those of its making, `stages` what was done."""

    artifact: ArtifactRef
    digest: str
    """Of its manifest."""
    checkpoint: Checkpoint
    recipe: Recipe
    stages: list[StageRecord]
    events: tuple[Event, ...]
    verdict: str
    """Its own."""
    calibration: dict[str, Any]
    """The ledger of the text it was made with."""

    @property
    def reference(self) -> str:
        """NAME@v0003."""
        return f"{self.artifact.name}@{self.artifact.version}"


def open_parent(reference: str, store: Path) -> Parent:
    """A version by name, number or folder. Raises RecipeError where it keeps no codes to write again, and CompressError
    where its files are not those that were published."""
    folder = Store(store).find(reference)
    published = manifest.read(folder)
    if manifest.model_digest(folder) != published.model_digest:
        raise CompressError(
            f"{folder}: the model's files are not those that were published; `compress verify {folder}` tells which."
        )
    recipe = load_recipe(folder / "recipe.yaml")
    model = folder / manifest.MODEL_FOLDER
    report = json.loads((folder / "reports" / "report.json").read_text(encoding="utf-8"))
    stages = [StageRecord(**stage) for stage in report["stages"]]
    packed = [name for name, format_ in FORMATS.items() if format_.packs and name != "gguf"]
    quantised = any(stage.modules for stage in stages)
    if recipe.export.format == "gguf" or (quantised and recipe.export.format not in packed):
        made_from = report.get("parent") or {}
        own = f"{made_from['name']}@{made_from['version']}" if made_from else "a version in one of these"
        raise RecipeError(
            f"{published.name}@{published.version} is in the format {recipe.export.format}, from which integers are "
            f"not read back. Export from {own} ({', '.join(packed)})"
        )
    checkpoint = Checkpoint(model)
    return Parent(
        ArtifactRef(path=str(folder), name=published.name, version=published.version, digest=published.model_digest),
        published.digest,
        checkpoint,
        recipe,
        stages,
        tuple(Event(**event) for event in report["events"] if event["kind"] in OF_MAKING - OF_FILES),
        published.verdict,
        report["calibration"],
    )


def plan_export(recipe: Recipe, parent: Parent, store: Path, progress: Progress) -> Plan:
    """The plan of writing `parent` as `recipe.export` says, and judging it: nothing is compressed again."""
    bare = recipe.model_copy(update={"stages": (), "calibration": None})
    try:
        plan = make_plan(bare, store, progress)
    except RecipeError as error:
        needed = f"{parent.reference} is judged again, for which its source is needed: "
        raise RecipeError([needed + each if each.startswith("model.") else each for each in error.mistakes]) from error
    config = {key: value for key, value in parent.checkpoint.config.items() if key != "quantization_config"}
    shape, schemes = Shape(config), parent.checkpoint.schemes
    # Parts of fused matrices that differ are no mistake here: the version was made so, and an event says it again.
    mistakes = format_mistakes(recipe, shape, schemes)
    if mistakes:
        raise RecipeError(mistakes)
    format_, size = FORMATS[recipe.export.format], plan.stored.itemsize
    packed = format_ if format_.stays_packed(schemes.values()) else FORMATS["plain"]
    per_element = kv_bytes(bare, parent.checkpoint.config, plan.stored)
    return replace(
        plan,
        recipe=recipe,
        kv_bytes=per_element,
        dimensions=shape.dimensions,
        matrices=shape.matrices,
        parameters_after=shape.parameters,
        schemes=schemes,
        stored_bytes=predict.stored_bytes(shape.tensors, shape.everything, schemes, size, format_)
        + format_.added_bytes(config),
        resident_bytes=predict.stored_bytes(shape.tensors, shape.everything, schemes, size, packed),
        kv_cache_bytes=predict.kv_cache_bytes(
            shape.dimensions, recipe.export.context, recipe.export.concurrency, per_element
        ),
        effective_bits=predict.effective_bits(shape.matrices, schemes, size, format_),
    )
