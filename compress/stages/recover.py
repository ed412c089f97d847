"""Recover: with the integers frozen, train scales and norm weights to bring a model back towards its source.

Rounding decided each linear by itself, or against the errors before it. Training sees the end: the KL divergence of the
next-token probabilities from the source's, lowered by gradient descent over a few epochs of calibration text (the
end-to-end phase of EfficientQAT, arXiv 2407.11062, with the source as teacher instead of the text). Codes, zero points,
embeddings and head stay. Windows kept out of training choose the state that ships; if none is better than the input,
the input ships.

Where the whole model does not fit, blocks are trained one by one against the source's (`training.block_wise`). A killed
run goes on from files under training/ in the stage's folder, which are removed when the blocks are written.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from compress.architecture import Architecture
from compress.calibration.self_generated import sample_windows
from compress.calibration.texts import SelfGenerated
from compress.calibration.walk import final_hidden_states
from compress.calibration.windows import Windows, WindowSpec
from compress.checkpoints.skeleton import Skeleton
from compress.events import Event
from compress.files import digest_of_json, write_json
from compress.memory import predict
from compress.memory.measure import free_bytes, release
from compress.quantization.scheme import Scheme
from compress.stages.base import Shapes, Stage, StageContext, StageOutcome, Training, TrainingMode, restore
from compress.training import saved
from compress.training.block_wise import OneBlock, all_through, source_outputs
from compress.training.clock import Clock
from compress.training.descent import Course, Descended, descend, steps_of
from compress.training.divergence import divergences
from compress.training.material import Material, material
from compress.training.student import AsExported, stored_values, trained_block
from compress.training.whole_model import teacher_states, whole_model


class Recover(Stage):
    """Train the scales and norm weights of a quantised model by its KL divergence from the source. Integers stay."""

    kind: Literal["recover"] = "recover"
    train: Literal["scales", "scales+norms"] = Field(default="scales+norms", description="what is trained")
    epochs: int = Field(default=3, ge=1, description="passes over the training windows")
    learning_rate: float = Field(
        default=1e-3, gt=0, description="Adam's at the first step, of a relative change; falls linearly to zero"
    )
    batch_tokens: int = Field(default=2048, ge=1, description="tokens of one step, in whole windows")
    holdout: float = Field(
        default=0.125, gt=0, lt=1, description="share of the calibration windows kept out, to choose what ships"
    )
    patience: int = Field(default=4, ge=1, description="evaluations without a better one before training stops")
    self_generated_windows: int = Field(
        default=0, ge=0, description="training windows sampled from the source model, beside the calibration text"
    )
    mode: TrainingMode = Field(
        default="auto",
        description="model: end to end; block: one decoder block after another; auto: model if that fits in memory",
    )
    seed: int = Field(default=0, ge=0, description="chooses and orders windows, and seeds sampled text")
    needs_calibration: ClassVar[bool] = True
    needs_codes: ClassVar[bool] = True

    @property
    def activation_streams(self) -> int:
        return 0  # nothing is held inside a block; `training` says what is kept

    @property
    def training(self) -> Training:
        # Forward, forward again, and a backward pass that counts twice; the teacher's pass and the evaluations.
        forwards = 1 + self.epochs * (4 * (1 - self.holdout) + 3 * self.holdout)
        norms = self.train == "scales+norms"
        return Training(forwards, self.batch_tokens, self.self_generated_windows, self.mode, norms)

    def check(self, shapes: Shapes, architecture: Architecture) -> list[str]:
        del shapes, architecture
        return []

    def schemes(self, shapes: Shapes) -> dict[str, Scheme]:
        del shapes
        return {}

    def apply(self, context: StageContext) -> StageOutcome:
        folder = context.output.folder / "training"
        run = _Run(self, context, folder)
        found = saved.load(folder / "result.safetensors")
        result = run.result() if found is None else _Result.restored(*found)
        if found is None:
            saved.save(folder / "result.safetensors", result.values, result.to_json())
        with run.clock.timed("write"):
            modules = _write(context, result.values)
        shutil.rmtree(folder)
        return StageOutcome(modules, result.events, run.clock.seconds, result.facts)


@dataclass(frozen=True)
class _Result:
    """New tensors by stored name (none: the input ships), what the report says, and events."""

    values: dict[str, Tensor]
    facts: dict[str, Any]
    events: list[Event]

    def to_json(self) -> dict[str, Any]:
        return {"facts": self.facts, "events": [event.to_json() for event in self.events]}

    @classmethod
    def restored(cls, values: dict[str, Tensor], notes: dict[str, Any]) -> _Result:
        return cls(values, notes["facts"], [Event(**event) for event in notes["events"]])


class _Run:
    """One application of the stage: its text, its two models, its clock."""

    def __init__(self, stage: Recover, context: StageContext, folder: Path) -> None:
        assert context.windows is not None, "the pipeline gives calibration windows to stages that need them"
        assert context.source.schemes, "plan refuses a recipe where nothing was quantised before"
        self.stage, self.context, self.windows, self.folder = stage, context, context.windows, folder
        self.source = AsExported(context.source.folder, context.stored)
        self.skeleton = Skeleton(self.source.config, context.device, context.compute)
        self.norms = stage.train == "scales+norms"
        self.course = Course(stage.epochs, stage.learning_rate, stage.patience, stage.seed)
        self.clock = Clock()
        self.events: list[Event] = []

    def result(self) -> _Result:
        """Train, and decide what ships."""
        if (self.folder / "mode.json").exists():
            self.events.append(Event("training_resumed", "recover", "an interrupted run had begun to train"))
        more, ledger = self._sampled()
        text = material(self.windows, more, self.stage.holdout, self.stage.batch_tokens, self.stage.seed)
        mode = self._mode(text)
        values, facts = self._whole_model(text) if mode == "model" else self._block_wise(text)
        improved = facts["held_out_kl_after"] < facts["held_out_kl_before"]
        if not improved:
            self.events.append(self._kept_input(facts))
            values = {}
        told = {
            "mode": mode,
            "learning_rate": self.stage.learning_rate,
            "trained_numbers": sum(value.numel() for value in values.values()),
            "windows_training": len(text.training),
            "windows_held_out": len(text.held_out),
            "tokens_training": text.tokens(text.training),
            "tokens_held_out": text.tokens(text.held_out),
            **facts,
        }
        return _Result(values, told | ({"self_generated": ledger} if ledger else {}), self.events)

    def _kept_input(self, facts: dict[str, Any]) -> Event:
        before, after = facts["held_out_kl_before"], facts["held_out_kl_after"]
        message = f"held-out KL {before:.4g} before training, at best {after:.4g} after: the input ships unchanged"
        return Event("recover_kept_input", "recover", message, {"before": before, "after": after})

    def _sampled(self) -> tuple[Windows | None, dict[str, Any]]:
        """Further training windows from the source itself, and their ledger."""
        if not self.stage.self_generated_windows:
            return None, {}
        path = self.folder / "sampled.safetensors"
        found = saved.load(path)
        if found is None:
            with self.clock.timed("sampling"):
                windows = self._sample()
            saved.save(path, {"ids": windows.ids}, windows.ledger)
            return windows, windows.ledger
        return Windows(found[0]["ids"], None, found[1]), found[1]

    def _sample(self) -> Windows:
        from transformers import AutoTokenizer

        # A seed of its own: the calibration text may have been sampled from the same model with the recipe's.
        seed = int(digest_of_json([self.stage.seed, self.windows.digest])[:12], 16)
        count, width = self.stage.self_generated_windows, int(self.windows.ids.shape[1])
        spec = WindowSpec(data=SelfGenerated(), windows=count, window_tokens=width)
        origin = self.context.origin
        tokenizer = AutoTokenizer.from_pretrained(origin.folder)
        return sample_windows(spec, origin, tokenizer, seed, self.context.device, self.context.progress)

    def _mode(self, text: Material) -> Literal["model", "block"]:
        """How to train; a run that goes on does so as it began, whatever is free now."""
        path = self.folder / "mode.json"
        if path.exists():
            begun = json.loads(path.read_text(encoding="utf-8"))
        else:
            needed = predict.whole_model_training_bytes(self._load(text))
            free = free_bytes(self.context.device)
            fits = needed < 0.8 * free
            mode = self.stage.mode if self.stage.mode != "auto" else "model" if fits else "block"
            begun = {"mode": mode, "needed": needed, "free": free}
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(path, begun)
        if self.stage.mode == "auto" and begun["mode"] == "block":
            message = f"training the whole model would take about {begun['needed']:,} bytes, {begun['free']:,} are free"
            self.events.append(Event("recover_block_wise", "recover", message, {"bytes": begun["needed"]}))
        chosen: Literal["model", "block"] = begun["mode"]
        return chosen

    def _load(self, text: Material) -> predict.TrainingLoad:
        config = self.skeleton.config
        return training_load(
            self.skeleton,
            self.source.schemes,
            self.norms,
            int(config.hidden_size),
            int(config.vocab_size),
            text.windows_at_once * text.ids.shape[1],
            text.ids.numel(),
        )

    def _whole_model(self, text: Material) -> tuple[dict[str, Tensor], dict[str, Any]]:
        path = self.folder / "teacher.safetensors"
        found = saved.load(path)
        if found is None:
            with self.clock.timed("teacher"):
                targets = teacher_states(self.skeleton, self.context.origin, text, self.context.progress)
            saved.save(path, {"states": targets}, {})
        else:
            targets = found[0]["states"]
        with (
            whole_model(self.skeleton, self.context.origin, self.source, text, targets, self.norms) as student,
            self.context.progress.task("recover", steps_of(text, self.course)) as advance,
        ):
            done = descend(student, text, self.course, self.folder / "step.safetensors", self.clock, advance)
            return stored_values(student.trained), _told(done) | {
                "held_out_kl_before": done.before,
                "held_out_kl_after": done.after,
            }

    def _block_wise(self, text: Material) -> tuple[dict[str, Tensor], dict[str, Any]]:
        held_out = [text.batch(rows) for rows in text.held_out_batches()]
        every = [text.batch(rows) for rows in text.every_batch()]
        with self.clock.timed("teacher"):
            pair = [
                list(final_hidden_states(self.skeleton, checkpoint, held_out, self.context.progress, label))
                for checkpoint, label in ((self.context.origin, "teacher"), (self.source, "before training"))
            ]
        states = torch.cat([hidden.cpu() for hidden in self.skeleton.embed(self.source, every)])
        values: dict[str, Tensor] = {}
        blocks: list[dict[str, Any]] = []
        count = self.skeleton.block_count
        with self.context.progress.task("recover", count * steps_of(text, self.course)) as advance:
            for index in range(count):
                states, found, facts = self._block(index, states, text, advance)
                values |= found
                blocks.append(facts)
                release()
        with self.skeleton.loaded(self.source, self.skeleton.architecture.final_norm) as norm, torch.no_grad():
            after = [norm(states[rows].to(self.context.device)) for rows in text.held_out_batches()]
        return values, {
            "held_out_kl_before": self._divergence(text, pair[0], pair[1]),
            "held_out_kl_after": self._divergence(text, pair[0], after),
            "steps": sum(block["steps"] for block in blocks),
            "blocks": blocks,
        }

    def _block(
        self, index: int, states: Tensor, text: Material, advance: Any
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Any]]:
        """Train one block, or take what an interrupted run made of it. Returns the states after it, too."""
        path, step = self.folder / f"block-{index:05d}.safetensors", self.folder / "step.safetensors"
        block, trained = trained_block(self.skeleton, self.source, index, self.norms)
        found = saved.load(path)
        if found is None:
            with self.clock.timed("teacher"):
                targets = source_outputs(self.skeleton, self.context.origin, text, index, states)
            objective = OneBlock(self.skeleton, text, index, block, states, targets, trained)
            done = descend(objective, text, self.course, step, self.clock, advance)
            factors = {name: relative.factor.detach().cpu() for name, relative in trained.items()}
            facts = _told(done) | {"held_out_error_before": done.before, "held_out_error_after": done.after}
            saved.save(path, factors, facts)
            step.unlink()
        else:
            factors, facts = found
            with torch.no_grad():
                for name, relative in trained.items():
                    relative.factor.copy_(factors[name])
            for _ in range(steps_of(text, self.course)):
                advance("going on")
        with self.clock.timed("forward"):
            states = all_through(self.skeleton, text, index, block, states)
        return states, stored_values(trained), facts

    def _divergence(self, text: Material, teacher: list[Tensor], student: list[Tensor]) -> float:
        """Mean KL divergence in nats over the windows kept out; normed final states per batch."""
        total, tokens = 0.0, 0
        with self.skeleton.head(self.source) as head:
            for rows, wanted, got in zip(text.held_out_batches(), teacher, student, strict=True):
                counts = text.counts(rows)
                values = divergences((head, wanted[counts]), (head, got[counts]))
                total, tokens = total + float(values.double().sum()), tokens + len(values)
        return total / max(1, tokens)


def training_load(
    skeleton: Skeleton,
    schemes: dict[str, Scheme],
    norms: bool,
    hidden: int,
    vocabulary: int,
    batch_tokens: int,
    kept_tokens: int,
) -> predict.TrainingLoad:
    """What predicting the memory of training takes, from shapes."""
    shapes = skeleton.linear_shapes()
    quantised = sum(shapes[module][0] * shapes[module][1] for module in schemes)
    scales = sum(shapes[module][0] * scheme.groups(shapes[module][1]) for module, scheme in schemes.items())
    first = [*skeleton.block(0).parameters()]
    block_parameters = sum(parameter.numel() for parameter in first)
    vectors = sum(parameter.numel() for parameter in first if parameter.dim() == 1)
    count = skeleton.block_count
    return predict.TrainingLoad(
        quantised=quantised,
        dense=count * block_parameters - quantised,
        trained=scales + norms * count * vectors,
        block_parameters=block_parameters,
        block_width=sum(rows + columns for rows, columns in shapes.values()) // count,
        blocks=count,
        hidden=hidden,
        vocabulary=vocabulary,
        batch_tokens=batch_tokens,
        kept_tokens=kept_tokens,
        compute_bytes=skeleton.dtype.itemsize,
    )


def _told(done: Descended) -> dict[str, Any]:
    return {
        "steps": done.step,
        "best_step": done.best_step,
        "stopped": done.stopped,
        "held_out": [f"{step}: {value:.5g}" for step, value in done.history],
    }


def _write(context: StageContext, values: dict[str, Tensor]) -> list[dict[str, Any]]:
    """The input with new scales and norms: the outer tensors, then block by block. Returns the modules' records."""
    source, output = context.source, context.output
    arch = source.architecture
    output.write_outer(source, values)
    count = 1 + max(index for name in source.names if (index := arch.block_index(name)) is not None)
    modules: list[dict[str, Any]] = []
    for index in range(count):
        record = output.block_record(index)
        if record is None:
            record = _write_block(context, index, values)
            context.after_block(index)
        modules += restore(record)[0]
    return modules


def _write_block(context: StageContext, index: int, values: dict[str, Tensor]) -> dict[str, Any]:
    source = context.source
    prefix = source.architecture.block_name(index) + "."
    quantised, records = {}, []
    for module in sorted(module for module in source.schemes if module.startswith(prefix)):
        scale = values.get(f"{module}.scale")
        if scale is not None:
            codes, grid = source.codes(module)
            quantised[module] = (codes, dataclasses.replace(grid, scale=scale))
            records.append(_record(module, index, source.schemes[module], codes.shape))
    record: dict[str, Any] = {"modules": records, "events": []}
    context.output.write_block(source, index, quantised, record, values)
    return record


def _record(module: str, index: int, scheme: Scheme, shape: torch.Size) -> dict[str, Any]:
    rows, columns = shape
    return {
        "name": module,
        "block": index,
        "scheme": scheme.label,
        "error": None,
        "seconds": 0.0,
        "effective_bits": 8 * scheme.stored_bytes(rows, columns) / (rows * columns),
        "events": [],
    }
