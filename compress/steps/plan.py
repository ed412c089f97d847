"""Everything that can be known before work starts: mistakes listed together, bytes, memory and time predicted."""

from __future__ import annotations

import math
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from compress import parallel
from compress.architecture import Architecture, Dimensions, architecture_of, dimensions_of
from compress.calibration.texts import SelfGenerated
from compress.checkpoints.compressed_tensors import cannot_load, unpacks_while_loading
from compress.checkpoints.export import FORMATS, stored_dtype
from compress.checkpoints.skeleton import Skeleton
from compress.checkpoints.sources import cache_folder, read_config
from compress.errors import RecipeError, ResourceError
from compress.evaluation.tasks import harness
from compress.evaluation.tasks.likelihood import STATES_BYTES
from compress.evaluation.tasks.size import Size, size_of
from compress.evaluation.tasks.spec import Task
from compress.events import Progress
from compress.memory import predict
from compress.memory.measure import available_bytes
from compress.quantization.scheme import Scheme
from compress.recipe import Recipe
from compress.stages.base import Training
from compress.steps.environment import Machine, choose_machine, fits
from compress.steps.power import Power, powers
from compress.steps.training import nothing_to_train, training_bytes, training_flops, trainings_of


@dataclass(frozen=True)
class Plan:
    """What a recipe will do, and what it will take. Bytes are bytes, seconds are seconds."""

    recipe: Recipe
    config: dict[str, Any]
    architecture: Architecture
    dimensions: Dimensions
    matrices: dict[str, tuple[int, int]]
    parameters: int
    schemes: dict[str, Scheme]
    machine: Machine
    stored: torch.dtype
    source_bytes: int
    stored_bytes: int
    resident_bytes: int
    kv_cache_bytes: int
    peak_host_bytes: int
    reload_bytes: int
    """Peak host memory of the round trip, should it be made."""
    disk_bytes: int
    seconds: float
    effective_bits: float | None
    warnings: tuple[str, ...]
    powers: tuple[Power, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Flat, for `plan --json`."""
        return {
            "name": self.recipe.name,
            "architecture": self.architecture.model_type,
            "parameters": self.parameters,
            "blocks": self.dimensions.blocks,
            "device": str(self.machine.device),
            "stored_dtype": str(self.stored).removeprefix("torch."),
            "quantised_linears": len(self.schemes),
            "linears": len(self.matrices),
            "schemes": sorted({scheme.label for scheme in self.schemes.values()}),
            "effective_bits": self.effective_bits,
            "source_bytes": self.source_bytes,
            "stored_bytes": self.stored_bytes,
            "resident_bytes": self.resident_bytes,
            "kv_cache_bytes": self.kv_cache_bytes,
            "context": self.recipe.export.context,
            "concurrency": self.recipe.export.concurrency,
            "peak_host_bytes": self.peak_host_bytes,
            "disk_bytes": self.disk_bytes,
            "seconds": self.seconds,
            "stages": [stage.kind for stage in self.recipe.stages],
            "gate_power": [asdict(power) for power in self.powers],
            "warnings": list(self.warnings),
        }


def make_plan(recipe: Recipe, store: Path, progress: Progress) -> Plan:
    """Check a recipe against model, machine and disk, and predict. Raises with every mistake of one kind together."""
    if recipe.tasks:
        harness.require()
    config = read_config(recipe.model, Path.cwd(), progress)
    machine = choose_machine(recipe.model.device, config)
    architecture = architecture_of(config)
    skeleton = Skeleton(config, torch.device("cpu"), torch.float32)
    matrices, shapes = skeleton.linear_shapes(), skeleton.parameter_shapes()
    dimensions = dimensions_of(skeleton.config)
    mistakes = _mistakes(recipe, architecture, dimensions, matrices)
    if mistakes:
        raise RecipeError(mistakes)
    schemes: dict[str, Scheme] = {}
    for stage in recipe.stages:
        schemes.update(stage.schemes(matrices))
    stored = stored_dtype(config, recipe.export.dtype, architecture.float16_safe)
    parameters = sum(math.prod(shape) for shape in shapes.values())
    source_bytes = parameters * _dtype_bytes(config)
    export_bytes = predict.stored_bytes(
        shapes, matrices, schemes, stored.itemsize, packs=FORMATS[recipe.export.format].packs
    )
    asked = sum((size_of(spec, recipe.seed) or Size() for spec in recipe.tasks), Size())
    load = _load(recipe, skeleton, dimensions, matrices, parameters, machine)
    trainings = trainings_of(recipe, skeleton, schemes, machine)
    disk = sum(predict.training_disk_bytes(training) for _, training in trainings)
    disk += export_bytes + len(recipe.stages) * (parameters + (parameters - _inside(matrices)) * 4)
    gate_powers = powers(recipe)
    plan = Plan(
        recipe=recipe,
        config=config,
        architecture=architecture,
        dimensions=dimensions,
        matrices=matrices,
        parameters=parameters,
        schemes=schemes,
        machine=machine,
        stored=stored,
        source_bytes=source_bytes,
        stored_bytes=export_bytes,
        resident_bytes=predict.stored_bytes(
            shapes,
            matrices,
            schemes,
            stored.itemsize,
            packs=FORMATS[recipe.export.format].packs and not unpacks_while_loading(list(set(schemes.values()))),
        ),
        kv_cache_bytes=predict.kv_cache_bytes(
            dimensions, recipe.export.context, recipe.export.concurrency, stored.itemsize
        ),
        peak_host_bytes=_peak(load, trainings, _samples(recipe), asked, machine),
        reload_bytes=predict.reload_peak_bytes(load),
        disk_bytes=disk,
        seconds=_seconds(recipe, matrices, dimensions, asked),
        effective_bits=predict.effective_bits(matrices, schemes, stored.itemsize),
        warnings=tuple(_warnings(recipe, schemes, architecture, dimensions) + _weak(gate_powers)),
        powers=tuple(gate_powers),
    )
    beside = parallel.neighbours() * predict.calibration_peak_bytes(load)
    _check_resources(plan, store, plan.peak_host_bytes + beside)
    return plan


def _mistakes(
    recipe: Recipe, architecture: Architecture, dimensions: Dimensions, matrices: dict[str, tuple[int, int]]
) -> list[str]:
    found = [
        f"stages[{index}]: {sentence}"
        for index, stage in enumerate(recipe.stages)
        for sentence in stage.check(matrices, architecture)
    ]
    found += nothing_to_train(recipe, matrices)
    format_ = FORMATS[recipe.export.format]
    if architecture.transposed_linears and not format_.transposed_linears:
        able = [name for name, other in FORMATS.items() if other.transposed_linears]
        found.append(
            f"export.format: {format_.name} cannot hold the transposed linears (Conv1D) of {architecture.model_type}: "
            f"loaders quantise nn.Linear only. Formats that can: {', '.join(able)}"
        )
    schemes = {scheme for stage in recipe.stages for scheme in stage.schemes(matrices).values()}
    if format_.packs and cannot_load(schemes):
        labels = ", ".join(sorted(scheme.label for scheme in schemes))
        found.append(
            f"export.format: transformers cannot load an asymmetric scheme beside another one from {format_.name} "
            f"({labels}). Use one scheme for all modules, symmetric ones, or format: plain"
        )
    if dimensions.max_context:
        texts = [("calibration", recipe.calibration)] if recipe.calibration else []
        texts += [
            (f"evaluation[{index}]", spec) for index, spec in enumerate(recipe.evaluation) if not isinstance(spec, Task)
        ]
        found += [
            f"{where}.window_tokens: {spec.window_tokens} is more than the model's context of {dimensions.max_context}"
            for where, spec in texts
            if spec is not None and spec.window_tokens > dimensions.max_context
        ]
    return found


def _warnings(
    recipe: Recipe, schemes: dict[str, Scheme], architecture: Architecture, dimensions: Dimensions
) -> list[str]:
    """Legal, but probably not what is wanted."""
    found = [
        f"task {spec.label}: its items are known once lm-eval has loaded them; time and memory are predicted without it"
        for spec in recipe.tasks
        if spec.file is None
    ]
    sizes = {scheme.group_size for scheme in schemes.values()} - {None, 32, 64, 128}
    if sizes:
        found.append(
            f"group sizes {sorted(size for size in sizes if size)} load in transformers, but vLLM's kernels take 32, "
            "64, 128 or channel"
        )
    if any(not scheme.symmetric and scheme.bits not in (4, 8) for scheme in schemes.values()):
        found.append("asymmetric schemes other than 4 and 8 bits load in transformers; vLLM does not serve them")
    if dimensions.max_context and recipe.export.context > dimensions.max_context:
        found.append(f"export.context {recipe.export.context} is more than the model's {dimensions.max_context} tokens")
    if not architecture.float16_safe and recipe.export.dtype == "float16":
        found.append(f"{architecture.model_type} activations are known to leave float16's range; bfloat16 is safer")
    return found


def _weak(gate_powers: list[Power]) -> list[str]:
    """Gates that will most likely not be decided."""
    return [
        f"{power.measure}: {power.units} resolve margins from {power.smallest_margin:.3g} up, the gate's is "
        f"{power.margin:g}: expect inconclusive. Take more of them, or a wider margin"
        for power in gate_powers
        if not power.suffices
    ]


def _load(
    recipe: Recipe,
    skeleton: Skeleton,
    dimensions: Dimensions,
    matrices: dict[str, tuple[int, int]],
    parameters: int,
    machine: Machine,
) -> predict.WalkLoad:
    streams = max(stage.activation_streams for stage in recipe.stages)
    calibrated = recipe.calibration.windows * recipe.calibration.window_tokens if recipe.calibration else 0
    calibrated = math.ceil(calibrated / parallel.met())
    return predict.WalkLoad(
        parameters=parameters,
        block_parameters=sum(parameter.numel() for parameter in skeleton.block(0).parameters()),
        widest_input=max(columns for _, columns in matrices.values()),
        rows_of_widest=max(rows for rows, _ in matrices.values()),
        hidden=dimensions.hidden,
        calibration_tokens=calibrated if streams and machine.device.type == "cpu" else 0,
        streams=streams,
        refines=any(stage.refines for stage in recipe.stages),
        evaluation_tokens=_evaluation_tokens(recipe),
        vocabulary=dimensions.vocabulary,
        compute_bytes=machine.compute.itemsize,
    )


def _evaluation_tokens(recipe: Recipe) -> int:
    """Tokens of all sets, a set measured twice counted once."""
    return sum({spec.set_name: spec.windows * spec.window_tokens for spec in recipe.on_text}.values())


def _peak(
    load: predict.WalkLoad,
    trainings: list[tuple[Training, predict.TrainingLoad]],
    samples: bool,
    asked: Size,
    machine: Machine,
) -> int:
    """The worst phase: sampling text (the whole model in float32), calibrating, training, measuring, asking, or, where
    it fits, reloading the export publicly."""
    peaks = [predict.calibration_peak_bytes(load), predict.evaluation_peak_bytes(load)]
    if asked.tokens:
        states = min(STATES_BYTES, asked.tokens * load.hidden * load.compute_bytes)
        peaks.append(predict.asking_peak_bytes(load, states, asked.positions))
    if samples and machine.device.type == "cpu":
        peaks.append(predict.INTERPRETER + load.parameters * 4)
    if machine.device.type == "cpu":
        states = load.evaluation_tokens * load.hidden * 4
        peaks += [predict.INTERPRETER + states + training_bytes(*training, machine) for training in trainings]
    if fits(load.parameters, predict.reload_peak_bytes(load), machine) and machine.device.type == "cpu":
        peaks.append(predict.reload_peak_bytes(load))
    return max(peaks)


def _samples(recipe: Recipe) -> bool:
    """Whether any text is sampled from the model."""
    if any(stage.training and stage.training.more_windows for stage in recipe.stages):
        return True
    text = recipe.calibration
    return text is not None and isinstance(text.descriptor(Path.cwd())[0].source, SelfGenerated)


def _seconds(recipe: Recipe, matrices: dict[str, tuple[int, int]], dimensions: Dimensions, asked: Size) -> float:
    """Arithmetic over a measured rate of multiplication, plus what starting up takes. Within a factor of two."""
    inside = _inside(matrices)
    evaluated = _evaluation_tokens(recipe)
    head = dimensions.hidden * dimensions.vocabulary
    flops = 2.0 * 2 * evaluated * (inside + head)
    # Text is written a token at a time, which reaches about a tenth of a product's rate.
    flops += 2.0 * 2 * ((asked.tokens + 10 * asked.writes) * inside + asked.positions * head)
    # Softmax and divergence over the vocabulary: about 40 slow operations a logit.
    flops += 40 * 10 * evaluated * dimensions.vocabulary
    for stage in recipe.stages:
        if stage.training and recipe.calibration:
            flops += training_flops(stage.training, recipe.calibration, inside, dimensions)
        elif stage.needs_calibration and recipe.calibration:
            tokens = recipe.calibration.windows * recipe.calibration.window_tokens
            flops += 2 * tokens * inside * stage.forwards
            # H takes a little over half of a product, D and R one and a third, of the tokens they cover.
            moments = 0.6 + 1.35 * (stage.activation_streams - 1)
            flops += sum(2 * tokens * moments * columns**2 for columns in _inputs(matrices))
            flops += sum(4 * columns**3 for columns in _inputs(matrices))
            products = 20 if stage.refines else 10
            flops += sum(products * rows * columns**2 for rows, columns in matrices.values())
        flops += 2500 * inside
    return 12.0 + flops / _multiplication_rate()


def _inputs(matrices: dict[str, tuple[int, int]]) -> list[int]:
    """Columns of each distinct input: q, k, v share one, gate and up another."""
    seen: dict[tuple[str, int], int] = {}
    for name, (_, columns) in matrices.items():
        block, leaf = name.rsplit(".", 1)
        kind = "qkv" if leaf in ("q_proj", "k_proj", "v_proj") else "up" if leaf in ("gate_proj", "up_proj") else leaf
        seen[(f"{block}.{kind}", columns)] = columns
    return list(seen.values())


def _multiplication_rate() -> float:
    """float32 operations a second of this machine's matrix product, from a tenth of a second of it."""
    left = torch.rand(768, 768)
    left @ left
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < 0.1:
        left @ left
        count += 1
    return 0.6 * count * 2 * 768**3 / (time.perf_counter() - started)


def _inside(matrices: dict[str, tuple[int, int]]) -> int:
    return sum(rows * columns for rows, columns in matrices.values())


def _dtype_bytes(config: dict[str, Any]) -> int:
    declared = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    return 2 if declared.endswith("16") else 4


def _check_resources(plan: Plan, store: Path, host_bytes: int) -> None:
    """Disk under store and cache, and memory of all processes here. Raises ResourceError with every shortage."""
    shortages = []
    for name, folder, needed in (
        ("store", store, plan.stored_bytes + 10**7),
        ("cache", cache_folder(), plan.disk_bytes),
    ):
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
        fewer = "processes or calibration windows" if processes else "calibration windows"
        shortages.append(
            f"memory: about {host_bytes:,} bytes are needed{processes} and {available:,} are available. Use fewer "
            f"{fewer}, or a larger machine."
        )
    if shortages:
        raise ResourceError("\n".join(shortages))
