"""Memory and time of a run, predicted from shapes; what `plan` prints."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch

from compress import parallel
from compress.architecture import Dimensions
from compress.calibration.outputs import HALVES, evenly, moment_shapes
from compress.calibration.texts import SelfGenerated
from compress.calibration.window_specs import DOCUMENT_TOKENS, CalibrationSpec
from compress.checkpoints.skeleton import Skeleton
from compress.evaluation.tasks.likelihood import STATES_BYTES
from compress.evaluation.tasks.size import Size
from compress.memory import predict
from compress.quantization.columns import column_kernel
from compress.recipe import Recipe
from compress.stages import Gptq, Sensitivity, Stage, StructuredPrune
from compress.stages.base import Training
from compress.stages.depth import TRIED
from compress.steps.environment import Machine, fits
from compress.steps.shapes import Shape, Shapes
from compress.steps.training import sampling_flops, training_bytes, training_flops
from compress.training.footprint import LoadOf


def walk_load(
    recipe: Recipe,
    skeleton: Skeleton,
    dimensions: Dimensions,
    matrices: dict[str, tuple[int, int]],
    parameters: int,
    machine: Machine,
    computes: bool | None = None,
) -> predict.WalkLoad:
    """What decides peaks of memory: the host's, or the device's where `computes` says that activations lie there."""
    computes = machine.device.type == "cpu" if computes is None else computes
    streams = max((stage.activation_streams for stage in recipe.stages), default=0)
    calibrated = recipe.calibration.tokens if recipe.calibration else 0
    calibrated = math.ceil(calibrated / parallel.met())
    if not (computes and streams):
        calibrated = 0
    replays = all(stage.replays for stage in recipe.stages if stage.activation_streams)
    return predict.WalkLoad(
        parameters=parameters,
        block_parameters=sum(parameter.numel() for parameter in skeleton.block(0).parameters()),
        widest_input=max(columns for _, columns in matrices.values()),
        rows_of_widest=max(rows for rows, _ in matrices.values()),
        hidden=dimensions.hidden,
        calibration_tokens=calibrated,
        held_tokens=min(calibrated, machine.tokens_at_once) if replays else calibrated,
        waiting_tokens=calibrated if replays and machine.device.type == "cpu" else 0,
        streams=streams,
        refines=any(stage.refines for stage in recipe.stages),
        judges_shifts=any(stage.judges_shifts for stage in recipe.stages),
        evaluation_tokens=_evaluation_tokens(recipe),
        vocabulary=dimensions.vocabulary,
        compute_bytes=machine.compute.itemsize,
    )


def _evaluation_tokens(recipe: Recipe) -> int:
    """Tokens of all sets, a set measured twice counted once."""
    return sum({spec.set_name: spec.windows * spec.window_tokens for spec in recipe.on_text}.values())


def peak_bytes(
    recipe: Recipe,
    source: Shape,
    load: predict.WalkLoad,
    trainings: list[tuple[Training, LoadOf]],
    asked: Size,
    machine: Machine,
) -> int:
    """The worst phase: sampling text (the whole model in float32 and a KV cache), a backward pass, calibrating,
    training, measuring, asking, or, where it fits, reloading the export publicly, beside the source to compare times.
    """
    dimensions = source.dimensions
    peaks = [predict.calibration_peak_bytes(load), predict.evaluation_peak_bytes(load)]
    if machine.device.type == "cpu" and recipe.calibration:
        peaks.append(predict.backward_peak_bytes(load, moments_bytes(recipe, source) // source.dimensions.blocks))
    if asked.tokens:
        states = min(STATES_BYTES, asked.tokens * load.hidden * load.compute_bytes)
        peaks.append(predict.asking_peak_bytes(load, states, asked.positions))
    if samples_text(recipe) and machine.device.type == "cpu":
        peaks.append(predict.INTERPRETER + load.parameters * 4 + _sampling_bytes(recipe, dimensions))
    if machine.device.type == "cpu":
        states = load.evaluation_tokens * load.hidden * 4
        peaks += [predict.INTERPRETER + states + training_bytes(*training, machine) for training in trainings]
    reloaded = predict.reload_peak_bytes(load)
    at_once = 2 if recipe.latency and fits(2 * load.parameters, 2 * reloaded, machine) else 1
    if fits(load.parameters, reloaded, machine) and machine.device.type == "cpu":
        peaks.append(at_once * reloaded)
    compiles = column_kernel(machine.device) == "numba" and any(isinstance(each, Gptq) for each in recipe.stages)
    return max(peaks) + (predict.NUMBA if compiles else 0)


def output_tokens(recipe: Recipe, stage: Stage) -> int:
    """Calibration tokens of the backward pass that a stage starts with."""
    text = recipe.calibration
    asked = stage.output_tokens_read(text.window_tokens) if text else 0
    return len(evenly(text.all_windows, text.window_tokens, asked)) * text.window_tokens if text and asked else 0


def moments_bytes(recipe: Recipe, source: Shape) -> int:
    """Bytes of the sums that a backward pass keeps of how outputs matter together, of all blocks, of the stage that has
    most."""
    first = source.architecture.block_name(0) + "."
    shapes = {name.removeprefix(first): shape for name, shape in source.matrices.items() if name.startswith(first)}
    blocks, head = source.dimensions.blocks, source.dimensions.head_dim
    found = [
        moment_shapes(source.architecture, shapes, blocks, head, tokens)
        for stage in recipe.stages
        if (tokens := output_tokens(recipe, stage))
    ]
    return max((sum(8 * HALVES * blocks * runs * size**2 for runs, size in each.values()) for each in found), default=0)


def backward_disk_bytes(recipe: Recipe, source: Shape, machine: Machine) -> int:
    """Bytes on disk while a backward pass runs: states of all blocks wait there, and go as the sums come."""
    tokens = max((output_tokens(recipe, stage) for stage in recipe.stages), default=0)
    waiting = tokens * source.dimensions.hidden * source.dimensions.blocks * machine.compute.itemsize
    return max(waiting, moments_bytes(recipe, source))


def samples_text(recipe: Recipe) -> bool:
    """Whether any text is sampled from the model."""
    if any(stage.training and stage.training.more_windows for stage in recipe.stages):
        return True
    text = recipe.calibration
    return text is not None and (text.self_generated_windows > 0 or _is_sampled(text))


def _sampling_bytes(recipe: Recipe, dimensions: Dimensions) -> int:
    """The KV cache of the windows that are sampled together, twice while it grows, and probabilities."""
    assert recipe.calibration is not None, "stages that train need a calibration text"
    text = recipe.calibration
    source = text.descriptor(Path.cwd())[0].source
    own = source if isinstance(source, SelfGenerated) else SelfGenerated(document_tokens=DOCUMENT_TOKENS)
    cache = predict.kv_cache_bytes(dimensions, text.window_tokens, own.batch_windows, 4)
    documents = own.batch_windows * math.ceil(text.window_tokens / (own.document_tokens or text.window_tokens))
    return 2 * cache + 3 * documents * dimensions.vocabulary * 4


def _sampled_tokens(recipe: Recipe) -> int:
    """Of calibration text, those that are sampled from the model before any stage runs."""
    text = recipe.calibration
    if text is None:
        return 0
    return (text.all_windows if _is_sampled(text) else text.self_generated_windows) * text.window_tokens


def _is_sampled(text: CalibrationSpec) -> bool:
    return isinstance(text.descriptor(Path.cwd())[0].source, SelfGenerated)


def seconds(recipe: Recipe, shapes: Shapes, asked: Size, machine: Machine) -> float:
    """Arithmetic over a measured rate of multiplication, plus what starting up takes. Within a factor of two."""
    matrices, dimensions = shapes.source.matrices, shapes.source.dimensions
    inside = weights_inside(matrices)
    evaluated = _evaluation_tokens(recipe)
    head = dimensions.hidden * dimensions.vocabulary
    flops = 2.0 * 2 * evaluated * (inside + head)
    # Text is written a token at a time, which reaches about a tenth of a product's rate.
    flops += 2.0 * 2 * ((asked.tokens + 10 * asked.writes) * inside + asked.positions * head)
    # Softmax and divergence over the vocabulary: about 40 slow operations a logit.
    flops += 40 * 10 * evaluated * dimensions.vocabulary
    flops += _search_flops(recipe, shapes)
    flops += sampling_flops(_sampled_tokens(recipe), inside, dimensions)
    compared: tuple[Stage, ...] = (Gptq(),) if any(stage.compares for stage in recipe.stages) else ()
    # What is compared is measured like the artifact: half of what both models take.
    flops += 2.0 * evaluated * (inside + head) if compared else 0
    for stage in (*recipe.stages, *compared):
        if stage.training and recipe.calibration:
            flops += training_flops(stage.training, recipe.calibration, inside, dimensions)
        elif stage.needs_calibration and recipe.calibration:
            tokens = recipe.calibration.tokens
            flops += 2 * tokens * inside * stage.forwards
            # Forward, forward again with gradients, and backward to activations; logits forward and backward.
            read = output_tokens(recipe, stage)
            flops += read * (6 * inside + 6 * head + 40 * 10 * dimensions.vocabulary)
            # H takes a little over half of a product, D and R one and a third, of the tokens they cover.
            moments = 0.6 + 1.35 * (stage.activation_streams - 1)
            flops += sum(2 * tokens * moments * columns**2 for columns in _inputs(matrices))
            flops += sum(4 * columns**3 for columns in _inputs(matrices))
            products = 20 if stage.refines else 10
            flops += sum(products * rows * columns**2 for rows, columns in matrices.values())
        if isinstance(stage, Sensitivity) and stage.tried_alone is not None:
            # The units of a block walk from there to the end, on average half of the blocks.
            alone, blocks = stage.alone_tokens, dimensions.blocks
            units = len(stage.units(shapes.source.architecture, matrices)) / blocks
            flops += units * alone * (inside * (blocks + 1) + blocks * (2 * head + 40 * 10 * dimensions.vocabulary))
        flops += 2500 * inside
    return 12.0 + flops / _multiplication_rate(machine)


def _search_flops(recipe: Recipe, shapes: Shapes) -> float:
    """Of finding blocks to remove: for each, the model twice, the rest of it for every block tried, their logits."""
    after = (*shapes.before, shapes.last)[1:]
    total = 0.0
    for stage, before, behind in zip(recipe.stages, shapes.before, after, strict=True):
        removed = before.dimensions.blocks - behind.dimensions.blocks
        if isinstance(stage, StructuredPrune) and removed and recipe.calibration:
            tokens = stage.tuning_windows * recipe.calibration.window_tokens
            vocabulary = before.dimensions.vocabulary
            logits = 4 * before.dimensions.hidden * vocabulary + 40 * 10 * vocabulary
            total += removed * tokens * (2 * weights_inside(before.matrices) * (2 + TRIED / 2) + TRIED * logits)
    return total


def _inputs(matrices: dict[str, tuple[int, int]]) -> list[int]:
    """Columns of each distinct input: q, k, v share one, gate and up another."""
    seen: dict[tuple[str, int], int] = {}
    for name, (_, columns) in matrices.items():
        block, leaf = name.rsplit(".", 1)
        kind = "qkv" if leaf in ("q_proj", "k_proj", "v_proj") else "up" if leaf in ("gate_proj", "up_proj") else leaf
        seen[(f"{block}.{kind}", columns)] = columns
    return list(seen.values())


def _multiplication_rate(machine: Machine) -> float:
    """Operations a second that a run reaches, from a tenth of a second of the machine's matrix product.

    On a GPU a run is much slower than its products in 16 bits: factors are made in float64, and files are read, hashed
    and written (docs/benchmarks/gpu.md).
    """
    size, share = (768, 0.6) if machine.device.type == "cpu" else (8192, 0.12)
    left = torch.rand(size, size, device=machine.device, dtype=machine.compute)
    _finish(left @ left)
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < 0.1:
        _finish(left @ left)
        count += 1
    return share * count * 2 * size**3 / (time.perf_counter() - started)


def _finish(product: torch.Tensor) -> None:
    """Wait for a GPU."""
    if product.is_cuda:
        torch.cuda.synchronize(product.device)


def weights_inside(matrices: dict[str, tuple[int, int]]) -> int:
    return sum(rows * columns for rows, columns in matrices.values())


def dtype_bytes(config: dict[str, Any]) -> int:
    declared = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    return 2 if declared.endswith("16") else 4
