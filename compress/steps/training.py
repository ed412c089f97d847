"""What `plan` knows of stages that train: whether there is something to train, and the bytes and time it will take."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from compress.architecture import Dimensions
from compress.calibration.window_specs import CalibrationSpec
from compress.checkpoints.skeleton import Skeleton
from compress.memory import predict
from compress.quantization.scheme import Scheme
from compress.recipe import Recipe
from compress.stages import STAGES, BitsAndBytesStage
from compress.stages.base import Stage, Training
from compress.stages.candidates import CandidateStage
from compress.stages.quantize import QuantizeStage
from compress.steps.environment import Machine
from compress.steps.shapes import Shapes
from compress.training.footprint import LoadOf, choose, training_load
from compress.training.trained import Trainable


def nothing_to_train(recipe: Recipe, shapes: Shapes) -> list[str]:
    """Stages that work on codes with no stage before them that makes any, and stages that work on plain weights behind
    one that does."""
    found = []
    coded: set[str] = set()
    for index, stage in enumerate(recipe.stages):
        where = recipe.place(index)
        if stage.training and recipe.calibration is not None and recipe.calibration.all_windows < 2:
            found.append(
                f"{where}: {stage.kind} keeps some calibration windows out of training, and there is only one; "
                "use calibration.windows: 2 or more"
            )
        tuning = getattr(stage, "tuning_windows", 0) if _tunes(stage, shapes, index) else 0
        if recipe.calibration is not None and 0 < recipe.calibration.all_windows <= tuning:
            found.append(
                f"{where}: {stage.kind} keeps {tuning} calibration windows apart (tuning_windows), and there "
                f"are {recipe.calibration.all_windows}; take more windows, or keep fewer apart"
            )
        if stage.needs_codes and not coded:
            makers = ", ".join(kind for kind, other in STAGES.items() if issubclass(other, QuantizeStage))
            found.append(
                f"{where}: {stage.kind} works on linears that were quantised before it, and no stage before it "
                f"quantises one; put a stage that does first ({makers})"
            )
        floating = [each.kind for each in recipe.stages[:index] if isinstance(each, BitsAndBytesStage)]
        if stage.training and floating:
            found.append(
                f"{where}: {stage.kind} trains what belongs to integer grids, and {floating[0]} before it "
                "makes none; leave one of them out"
            )
        blocks = shapes.source.dimensions.blocks, shapes.before[index].dimensions.blocks
        if stage.training and stage.training.mode == "block" and blocks[0] != blocks[1]:
            found.append(
                f"{where}: mode: block trains each block against the source's, which has {blocks[0]} where the "
                f"pruned model has {blocks[1]}; use mode: model or auto"
            )
        if stage.needs_weights and coded:
            found.append(
                f"{where}: {stage.kind} works on plain weights, and a stage before it quantised some; put it "
                "before them"
            )
        matrices = shapes.before[index].matrices
        coded |= set(matrices) if stage.follows_plan else set() if stage.on_vocabulary else set(stage.schemes(matrices))
    return found


def _tunes(stage: Stage, shapes: Shapes, index: int) -> bool:
    """Whether a stage keeps tuning windows apart."""
    after = shapes.before[index + 1] if index + 1 < len(shapes.before) else shapes.last
    return isinstance(stage, CandidateStage) or after.dimensions.blocks < shapes.before[index].dimensions.blocks


def trainings_of(
    recipe: Recipe, shapes: Shapes, schemes: dict[str, Scheme], machine: Machine
) -> list[tuple[Training, LoadOf]]:
    """What each stage that trains does, and what decides its memory, by what is trained."""
    found: list[tuple[Training, LoadOf]] = []
    for index, (stage, shape) in enumerate(zip(recipe.stages, shapes.before, strict=True)):
        training = stage.training
        coded = schemes if any(issubclass(type(each), QuantizeStage) for each in recipe.stages[:index]) else {}
        if training is not None and recipe.calibration is not None:
            window = recipe.calibration.window_tokens
            windows = recipe.calibration.all_windows + training.more_windows
            batch = min(windows, max(1, training.batch_tokens // window)) * window
            kept = windows * window
            load_of = partial(_load, shape.skeleton, coded, batch, kept, machine)
            found.append((training, load_of))
    return found


def fallbacks(trainings: list[tuple[Training, LoadOf]], machine: Machine) -> list[str]:
    """What will be trained otherwise than asked, as far as can be said from what is free now."""
    found = []
    for training, load_of in trainings:
        choice = choose(training.mode, training.trained, load_of, machine.device)
        needed = predict.whole_model_training_bytes(load_of(training.trained))
        asked = f"recover: training {training.trained.what} of the whole model takes about {needed:,} bytes"
        less = choice.train != training.trained.what
        if less or (training.mode == "auto" and choice.mode == "block"):
            instead: list[str] = [choice.train] if less else []
            instead += ["one block after another"] if choice.mode == "block" else []
            found.append(
                f"{asked}, and {choice.free:,} are free: it will train {', '.join(instead)}; a smaller "
                "batch_tokens takes less"
            )
    return found


def _load(
    skeleton: Skeleton, schemes: dict[str, Scheme], batch: int, kept: int, machine: Machine, trained: Trainable
) -> predict.TrainingLoad:
    return training_load(skeleton, schemes, trained, batch, kept, machine.compute)


def training_bytes(training: Training, load_of: LoadOf, machine: Machine) -> int:
    """Host bytes of one such stage on a CPU, beside the interpreter."""
    choice = choose(training.mode, training.trained, load_of, machine.device)
    load = load_of(replace(training.trained, what=choice.train))
    if choice.mode == "model":
        return predict.whole_model_training_bytes(load, choice.kept_blocks)
    return predict.block_training_bytes(load)


def training_flops(training: Training, text: CalibrationSpec, inside: int, dimensions: Dimensions) -> float:
    """Multiplications of all passes, logits of source and student, weights rebuilt in every step, text sampled."""
    sampled = training.more_windows * text.window_tokens
    tokens = text.tokens + sampled
    head = dimensions.hidden * dimensions.vocabulary
    # Logits of both models are formed once where blocks run forward, forward and backward; the softmaxes are slow.
    logits = training.forwards / 4 * tokens
    flops = 2 * training.forwards * tokens * inside + logits * (6 * head + 40 * 10 * dimensions.vocabulary)
    flops += 100 * inside * logits / training.batch_tokens
    return flops + sampling_flops(sampled, inside, dimensions)


def sampling_flops(tokens: int, inside: int, dimensions: Dimensions) -> float:
    """Of sampling tokens from the model: one at a time, a few windows together, so that products wait for weights."""
    return 2 * 2.0 * tokens * (inside + dimensions.hidden * dimensions.vocabulary)
