"""Everything that can be known before work starts: mistakes listed together, bytes, memory and time predicted."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from compress import parallel
from compress.architecture import Architecture, Dimensions, architecture_of
from compress.checkpoints.export import stored_dtype
from compress.checkpoints.formats import FORMATS
from compress.checkpoints.sources import ModelSpec, cache_folder, read_config
from compress.errors import RecipeError, ResourceError
from compress.evaluation.tasks import harness
from compress.evaluation.tasks.size import Size, size_of, size_of_latency, size_of_prompts
from compress.events import Progress
from compress.memory import predict
from compress.memory.measure import available_bytes
from compress.quantization.scheme import Scheme
from compress.recipe import Recipe
from compress.stages.base import Training
from compress.steps.checks import (
    blocks_that_may_not_fit,
    format_mistakes,
    mistakes_of,
    quantised_before,
    warnings_of,
    weak_gates,
)
from compress.steps.costs import backward_disk_bytes, dtype_bytes, peak_bytes, seconds, walk_load, weights_inside
from compress.steps.device import DevicePeaks, device_peaks
from compress.steps.environment import Machine, choose_machine
from compress.steps.power import Power, powers
from compress.steps.precision import expected_schemes
from compress.steps.shapes import Shapes, shapes_along
from compress.steps.training import fallbacks, trainings_of
from compress.training.footprint import LoadOf


@dataclass(frozen=True)
class Plan:
    """What a recipe will do, and what it will take. Bytes are bytes, seconds are seconds."""

    recipe: Recipe
    config: dict[str, Any]
    architecture: Architecture
    dimensions: Dimensions
    matrices: dict[str, tuple[int, int]]
    parameters: int
    """Of the source; `dimensions` and `matrices` are those of the result."""
    parameters_after: int
    counts: dict[str, tuple[int, int]]
    """Before and after, of what stages take pieces from: blocks, kv_heads, mlp_channels."""
    schemes: dict[str, Scheme]
    machine: Machine
    stored: torch.dtype
    source_bytes: int
    stored_bytes: int
    resident_bytes: int
    kv_bytes: int
    """Of an element of the KV cache."""
    kv_cache_bytes: int
    peak_host_bytes: int
    peak_device_bytes: int | None
    """Of tensors on a GPU; None without one, or where a part of the run is not predicted."""
    reload_bytes: int
    """Peak host memory of the round trip, should it be made."""
    disk_bytes: int
    seconds: float
    effective_bits: float | None
    warnings: tuple[str, ...]
    powers: tuple[Power, ...] = ()
    budgets: tuple[str, ...] = ()
    """Of stages that choose precision, what of each budget goes where."""

    @property
    def linear_schemes(self) -> dict[str, Scheme]:
        """Of linears; `schemes` has those of embedding and head too."""
        return {module: scheme for module, scheme in self.schemes.items() if module in self.matrices}

    def to_json(self) -> dict[str, Any]:
        """Flat, for `plan --json`."""
        return {
            "name": self.recipe.name,
            "architecture": self.architecture.model_type,
            "parameters": self.parameters,
            "parameters_after": self.parameters_after,
            "pruned": {name: list(pair) for name, pair in self.counts.items() if pair[0] != pair[1]},
            "blocks": self.dimensions.blocks,
            "device": str(self.machine.device),
            "stored_dtype": str(self.stored).removeprefix("torch."),
            "quantised_linears": len(self.linear_schemes),
            "linears": len(self.matrices),
            "schemes": sorted({scheme.label for scheme in self.linear_schemes.values()}),
            "vocabulary": {name: each.label for name, each in self.schemes.items() if name not in self.matrices},
            "effective_bits": self.effective_bits,
            "source_bytes": self.source_bytes,
            "stored_bytes": self.stored_bytes,
            "resident_bytes": self.resident_bytes,
            "kv_cache_bytes": self.kv_cache_bytes,
            "context": self.recipe.export.context,
            "concurrency": self.recipe.export.concurrency,
            "peak_host_bytes": self.peak_host_bytes,
            "peak_device_bytes": self.peak_device_bytes,
            "disk_bytes": self.disk_bytes,
            "seconds": self.seconds,
            "stages": [stage.kind for stage in self.recipe.stages],
            "budgets": list(self.budgets),
            "gate_power": [asdict(power) for power in self.powers],
            "warnings": list(self.warnings),
        }


def plan_evaluation(recipe: Recipe, model: ModelSpec, progress: Progress) -> Plan:
    """The plan of judging `model` by a recipe: what it takes, without any stage and without a store."""
    judged = recipe.model_copy(update={"model": model, "stages": (), "calibration": None})
    return replace(make_plan(judged, None, progress), recipe=recipe)


def make_plan(recipe: Recipe, store: Path | None, progress: Progress) -> Plan:
    """Check a recipe against model, machine and disk, and predict. Raises with every mistake of one kind together.

    `store` is None where nothing will be published.
    """
    if recipe.tasks:
        harness.require()
    config = read_config(recipe.model, Path.cwd(), progress)
    machine = choose_machine(recipe.model.device, config)
    architecture = architecture_of(config)
    stored = stored_dtype(config, recipe.export.dtype, architecture.float16_safe)
    shapes = _shapes_without_mistakes(recipe, config, stored)
    source, last = shapes.source, shapes.last
    matrices, dimensions, parameters = source.matrices, source.dimensions, source.parameters
    source_bytes = parameters * dtype_bytes(config)
    schemes, budgets = _schemes_without_mistakes(recipe, shapes, stored, source_bytes)
    format_ = FORMATS[recipe.export.format]
    export_bytes = predict.stored_bytes(last.tensors, last.everything, schemes, stored.itemsize, format_)
    export_bytes += format_.added_bytes(last.config)
    export_bytes += sum(stage.added_bytes(last.dimensions, stored.itemsize) for stage in recipe.stages)
    per_element = kv_bytes(recipe, config, stored)
    stays = format_.stays_packed(schemes.values())
    asked = sum((size_of(spec, recipe.seed) or Size() for spec in recipe.tasks), size_of_prompts(recipe.prompts))
    load = walk_load(recipe, source.skeleton, dimensions, matrices, parameters, machine)
    on_device = device_peaks(
        recipe,
        lambda part: walk_load(part, source.skeleton, dimensions, matrices, parameters, machine, computes=True),
        machine,
    )
    trainings = trainings_of(recipe, shapes, schemes, machine)
    gate_powers = powers(recipe)
    warned = warnings_of(recipe, config, schemes, last.everything, architecture, dimensions)
    warned += blocks_that_may_not_fit(recipe, shapes, stored.itemsize)
    plan = Plan(
        recipe=recipe,
        config=config,
        architecture=architecture,
        dimensions=last.dimensions,
        matrices=last.matrices,
        parameters=parameters,
        parameters_after=last.parameters,
        counts=_counts(source.dimensions, last.dimensions),
        schemes=schemes,
        machine=machine,
        stored=stored,
        source_bytes=source_bytes,
        stored_bytes=export_bytes,
        resident_bytes=predict.stored_bytes(
            last.tensors,
            last.everything,
            schemes,
            stored.itemsize,
            format_ if stays else FORMATS["plain"],
        ),
        kv_bytes=per_element,
        kv_cache_bytes=predict.kv_cache_bytes(
            last.dimensions, recipe.export.context, recipe.export.concurrency, per_element
        ),
        peak_host_bytes=peak_bytes(recipe, source, load, trainings, asked, machine)
        + (on_device.pinned if on_device else 0),
        peak_device_bytes=on_device.run if on_device else None,
        reload_bytes=predict.reload_peak_bytes(load),
        disk_bytes=export_bytes + _disk_beside_export(recipe, shapes, trainings, config, stored, machine),
        seconds=seconds(recipe, shapes, asked + size_of_latency(recipe.latency), machine),
        effective_bits=predict.effective_bits(last.matrices, schemes, stored.itemsize, format_),
        warnings=tuple(warned + fallbacks(trainings, machine) + weak_gates(gate_powers)),
        powers=tuple(gate_powers),
        budgets=tuple(budgets),
    )
    beside = parallel.neighbours() * predict.calibration_peak_bytes(load)
    _check_resources(plan, store, plan.peak_host_bytes + beside, on_device)
    return plan


def _shapes_without_mistakes(recipe: Recipe, config: dict[str, Any], stored: torch.dtype) -> Shapes:
    """Shapes along the stages. Raises RecipeError with every mistake of stages, texts and gates."""
    shapes, mistakes = shapes_along(recipe, config, stored.itemsize)
    mistakes += mistakes_of(recipe, shapes)
    if mistakes:
        raise RecipeError(mistakes)
    return shapes


def _schemes_without_mistakes(
    recipe: Recipe, shapes: Shapes, stored: torch.dtype, source_bytes: int
) -> tuple[dict[str, Scheme], list[str]]:
    """The scheme of each matrix that comes out, and budgets explained. Raises RecipeError where nothing fits a budget,
    or the format cannot hold a scheme."""
    schemes, mistakes, budgets = expected_schemes(recipe, shapes, stored.itemsize, source_bytes)
    mistakes = mistakes or format_mistakes(recipe, shapes.last, schemes)
    if mistakes:
        raise RecipeError(mistakes)
    return schemes, budgets


def _disk_beside_export(
    recipe: Recipe,
    shapes: Shapes,
    trainings: list[tuple[Training, LoadOf]],
    config: dict[str, Any],
    stored: torch.dtype,
    machine: Machine,
) -> int:
    """Bytes that a run takes in the cache at most, what is exported not counted."""
    source = shapes.source
    disk = sum(predict.training_disk_bytes(load_of(training.trained)) for training, load_of in trainings)
    disk += sum(stage.extra_disk_bytes(source.of(stage)) for stage in recipe.stages)
    disk += backward_disk_bytes(recipe, source, machine)
    disk += FORMATS[recipe.export.format].reading_bytes(shapes.last.parameters)
    disk += source.parameters * stored.itemsize if quantised_before(config) else 0  # its values, beside it in the cache
    outside = source.parameters - weights_inside(source.matrices)
    return disk + len(recipe.stages) * (source.parameters + outside * 4)


def kv_bytes(recipe: Recipe, config: Mapping[str, Any], stored: torch.dtype) -> int:
    """Bytes of an element of the KV cache: what a stage prepares for, or a model without stages was prepared for; else
    of the stored dtype."""
    prepared = [stage.kv_bytes for stage in recipe.stages if stage.kv_bytes is not None]
    if prepared:
        return prepared[-1]
    scheme = (config.get("quantization_config") or {}).get("kv_cache_scheme")
    return int(scheme["num_bits"]) // 8 if scheme and not recipe.stages else stored.itemsize


def _counts(before: Dimensions, after: Dimensions) -> dict[str, tuple[int, int]]:
    return {
        "blocks": (before.blocks, after.blocks),
        "kv_heads": (before.kv_heads, after.kv_heads),
        "mlp_channels": (before.mlp_width, after.mlp_width),
    }


def _check_resources(plan: Plan, store: Path | None, host_bytes: int, on_device: DevicePeaks | None) -> None:
    """Disk under store and cache, memory of all processes here, and a GPU's for calibration. Raises ResourceError with
    every shortage."""
    places = []
    if store is not None:
        places = [("store", store, plan.stored_bytes + 10**7), ("cache", cache_folder(), plan.disk_bytes)]
    shortages = []
    for name, folder, needed in places:
        existing = next((path for path in (folder, *folder.resolve().parents) if path.exists()), None)
        if existing is None:
            continue
        free = shutil.disk_usage(existing).free
        if free < needed:
            shortages.append(
                f"disk: the {name} {folder} needs about {needed:,} bytes and has {free:,} free. Free some space, or "
                + "use "
                + ("--store elsewhere." if name == "store" else "another COMPRESS_CACHE.")
            )
    available = available_bytes()
    if host_bytes > available:
        processes = f" by {parallel.neighbours() + 1} processes" if parallel.neighbours() else ""
        own = plan.recipe.calibration is not None and plan.recipe.calibration.self_generated_windows > 0
        fewer = f"{'processes or ' if processes else ''}{'calibration' if plan.recipe.stages else 'evaluation'} windows"
        fewer += " (self_generated_windows among them, which take the whole model)" if own else ""
        shortages.append(
            f"memory: about {host_bytes:,} bytes are needed{processes} and {available:,} are available. Use fewer "
            f"{fewer}, or a larger machine."
        )
    if on_device and (shortage := on_device.shortage(plan.machine)):
        shortages.append(shortage)
    if shortages:
        raise ResourceError("\n".join(shortages))
