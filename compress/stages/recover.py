"""Recover: train a pruned or quantised model to bring it back towards its source.

Pruning and rounding decide each linear by itself, or against the errors before it. Training sees the end: the KL
divergence of the next-token probabilities from the source's, lowered by gradient descent over a few epochs of
calibration text. For a quantised model that is the end-to-end phase of EfficientQAT (arXiv 2407.11062) with the source
as teacher instead of the text: scales and norms are trained and, if asked for, the codes (quantisation-aware training).
For a pruned one it is knowledge distillation: all weights of the blocks are trained, or low-rank changes to them. Zero
points, embeddings and head stay. Windows kept out of training choose the state that ships; if none is better than the
input, the input ships.

Where the whole model does not fit, blocks are trained one by one against the source's (`training.block_wise`). A killed
run goes on from files in the stage's scratch folder, which is removed when the stage is finished.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from compress.architecture import Architecture
from compress.calibration.products import Products, chosen
from compress.calibration.self_generated import sample_windows
from compress.calibration.texts import SelfGenerated
from compress.calibration.window_specs import DOCUMENT_TOKENS, WindowSpec
from compress.calibration.windows import HELD_OUT, Windows
from compress.checkpoints.skeleton import Skeleton
from compress.errors import ResourceError
from compress.events import Event
from compress.files import digest_of_json, write_json
from compress.memory.predict import TrainingLoad, whole_model_training_bytes
from compress.quantization.scheme import Scheme
from compress.stages.base import Shapes, Stage, StageContext, StageOutcome, Training, restore
from compress.training import saved
from compress.training.block_wise import train_block_wise
from compress.training.clock import Clock
from compress.training.descent import Course, share_of_rate
from compress.training.footprint import Choice, Mode, choose, training_load
from compress.training.material import Material, material
from compress.training.setting import Setting
from compress.training.student import AsExported
from compress.training.trained import Trainable, What, rate_of_codes, require_peft
from compress.training.whole_model import train_whole_model


class Recover(Stage):
    """Train a pruned or quantised model by its KL divergence from the source."""

    kind: Literal["recover"] = "recover"
    train: What = Field(
        default="scales+norms",
        description="of a quantised model scales, scales+norms, or codes (with both); of any norms; of a pruned one "
        "weights (of all blocks, with norms) or lora (low-rank changes to them, merged)",
    )
    rank: int = Field(default=16, ge=1, description="of LoRA's matrices")
    hidden_share: float = Field(
        default=0.0,
        ge=0,
        description="weight in the loss, beside the KL, of the relative squared difference of final hidden states",
    )
    epochs: int = Field(default=3, ge=1, description="passes over the training windows")
    learning_rate: float = Field(
        default=1e-3,
        gt=0,
        allow_inf_nan=False,
        description="Adam's largest, of a relative change; rises over a fifth of the steps and falls linearly to zero",
    )
    batch_tokens: int = Field(default=2048, ge=1, description="tokens of one step, in whole windows")
    holdout: float = Field(
        default=HELD_OUT, gt=0, lt=1, description="share of the calibration windows kept out, to choose what ships"
    )
    patience: int = Field(default=6, ge=1, description="evaluations without a better one before training stops")
    self_generated_windows: int = Field(
        default=0, ge=0, description="training windows sampled from the source model, beside the calibration text"
    )
    products: Products = Field(
        default="auto",
        description="what linears multiply in while they train; auto: bfloat16 on a CPU with AMX, else the walk's; "
        "what ships is judged in the walk's",
    )
    mode: Mode = Field(
        default="auto",
        description="model: end to end; block: one decoder block after another; auto: model if that fits in memory",
    )
    needs_calibration: ClassVar[bool] = True
    draws: ClassVar[bool] = True

    @property
    def activation_streams(self) -> int:
        return 0  # nothing is held inside a block; `training` says what is kept

    @property
    def training(self) -> Training:
        # Forward, again where memory is short, and a backward pass that counts twice; the teacher's and evaluations.
        forwards = 1 + self.epochs * (4 * (1 - self.holdout) + 3 * self.holdout)
        return Training(forwards, self.batch_tokens, self.self_generated_windows, self.mode, self._trained)

    def steps(self, windows: int, window_tokens: int) -> int:
        """Of training, for so many calibration windows."""
        held_out = min(windows - 1, max(1, round(self.holdout * windows)))
        at_once = max(1, self.batch_tokens // window_tokens)
        return self.epochs * math.ceil((windows - held_out + self.self_generated_windows) / at_once)

    def way_of_codes(self, windows: int, window_tokens: int) -> float:
        """How far trained codes can come in all steps, in codes."""
        steps = self.steps(windows, window_tokens)
        way = sum(share_of_rate(step, steps) for step in range(steps))
        return way * self.learning_rate * rate_of_codes(way)

    @property
    def needs_codes(self) -> bool:
        return self._trained.scales

    @property
    def needs_weights(self) -> bool:
        return self.train in ("weights", "lora")

    @property
    def _trained(self) -> Trainable:
        return Trainable(self.train, self.rank)

    @model_validator(mode="after")
    def _hidden_states_of_the_whole(self) -> Recover:
        if self.hidden_share and self.mode == "block":
            raise ValueError(
                "hidden_share is part of the loss of mode: model; block by block, states are the whole loss"
            )
        if (
            "rank" in self.model_fields_set
            and self.train != "lora"
            and self.rank != Recover.model_fields["rank"].default
        ):
            raise ValueError(f"rank is LoRA's; train is {self.train}")
        return self

    def check(self, shapes: Shapes, architecture: Architecture) -> list[str]:
        del shapes, architecture
        if self.train == "lora":
            require_peft()
        return []

    def schemes(self, shapes: Shapes) -> dict[str, Scheme]:
        del shapes
        return {}

    def apply(self, context: StageContext) -> StageOutcome:
        folder = context.output.scratch
        run = _Run(self, context, folder)
        found = saved.load(folder / "result.safetensors")
        result = run.result() if found is None else _Result.restored(*found)
        if found is None:
            saved.save(folder / "result.safetensors", result.values, result.to_json())
        with run.clock.timed("write"):
            modules = _write(context, result.values)
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
    """One application of the stage: its text, its models, its clock and its ledger."""

    def __init__(self, stage: Recover, context: StageContext, folder: Path) -> None:
        assert context.windows is not None, "the pipeline gives calibration windows to stages that need them"
        assert context.source.schemes or not stage.needs_codes, "plan refuses a recipe where nothing was quantised"
        self.stage, self.context, self.windows, self.folder = stage, context, context.windows, folder
        self.clock = Clock()
        self.events: list[Event] = []

    def result(self) -> _Result:
        """Train, and decide what ships."""
        if (self.folder / "mode.json").is_file():
            self.events.append(
                Event("training_resumed", "recover", "an interrupted run had begun to train; seconds are those since")
            )
        more, ledger = self._sampled()
        text = material(self.windows, more, self.stage.holdout, self.stage.batch_tokens, self.context.seed)
        setting = self._setting(text)
        choice = self._choice(setting)
        trained = replace(setting.training, what=choice.train)
        setting = replace(setting, training=trained, kept_blocks=choice.kept_blocks)
        outcome = train_whole_model(setting) if choice.mode == "model" else train_block_wise(setting)
        improved = outcome.after < outcome.before
        if not improved:
            # `after` is that of the best state seen, which in whole-model training may be the input itself.
            message = f"nothing that training reached was below the input's held-out KL of {outcome.before:.4g}"
            message += f" ({outcome.facts['stopped']})" if outcome.facts.get("stopped") else ""
            numbers = {"before": outcome.before, "best": outcome.after}
            self.events.append(Event("recover_kept_input", "recover", message, numbers))
        facts = {
            "mode": choice.mode,
            "train": choice.train,
            "learning_rate": self.stage.learning_rate,
            "products": str(setting.products).removeprefix("torch."),
            "windows_training": len(text.training),
            "windows_held_out": len(text.held_out),
            "tokens_training": text.tokens(text.training),
            "tokens_held_out": text.tokens(text.held_out),
            "held_out_kl_before": outcome.before,
            "held_out_kl_after": outcome.after if improved else outcome.before,
            **outcome.facts,
            **({"self_generated": ledger} if ledger else {}),
        }
        if improved and choice.train == "codes":
            facts["codes_changed"] = _changed(setting.source, outcome.values)
            if not facts["codes_changed"]:
                message = "every code is what it was: too few steps, or too low a rate, to come to the next"
                self.events.append(Event("codes_unmoved", "recover", message))
        return _Result(outcome.values if improved else {}, facts, self.events)

    def _setting(self, text: Material) -> Setting:
        stage, context = self.stage, self.context
        source = AsExported(context.source.folder, context.stored)
        return Setting(
            origin=context.origin,
            teacher=Skeleton(context.origin.config, context.device, context.compute),
            source=source,
            skeleton=Skeleton(source.config, context.device, context.compute),
            material=text,
            training=replace(stage._trained, seed=context.seed),
            products=chosen(stage.products, context.device, context.compute),
            hidden_share=stage.hidden_share,
            course=Course(stage.epochs, stage.learning_rate, stage.patience, context.seed),
            folder=self.folder,
            clock=self.clock,
            progress=context.progress,
            unquantised=self._unquantised,
        )

    def _unquantised(self, module: str) -> Tensor | None:
        """The weight of a linear that its codes were made of: of the last checkpoint before them that has it."""
        for checkpoint in reversed((self.context.origin, *self.context.chain)):
            if module not in checkpoint.schemes:
                return checkpoint.matrix(module)
        return None

    def _sampled(self) -> tuple[Windows | None, dict[str, Any]]:
        """Further training windows from the source itself, and their ledger."""
        if not self.stage.self_generated_windows:
            return None, {}
        path = self.folder / "sampled.safetensors"
        found = saved.load(path)
        if found is not None:
            return Windows(found[0]["ids"], None, found[1]), found[1]
        with self.clock.timed("sampling"):
            windows = self._sample()
        saved.save(path, {"ids": windows.ids}, windows.ledger)
        return windows, windows.ledger

    def _sample(self) -> Windows:
        from transformers import AutoTokenizer

        # A seed of its own: the calibration text may have been sampled from the same model with the recipe's.
        seed = int(digest_of_json([self.context.seed, self.windows.digest])[:12], 16)
        count, width = self.stage.self_generated_windows, int(self.windows.ids.shape[1])
        spec = WindowSpec(data=SelfGenerated(document_tokens=DOCUMENT_TOKENS), windows=count, window_tokens=width)
        origin = self.context.origin
        tokenizer = AutoTokenizer.from_pretrained(origin.folder)
        return sample_windows(spec, origin, tokenizer, seed, self.context.device, self.context.progress)

    def _choice(self, setting: Setting) -> Choice:
        """How to train. A run that goes on does so as it began, whatever is free now."""
        path, text = self.folder / "mode.json", setting.material
        tokens = text.windows_at_once * text.ids.shape[1]

        def load_of(training: Trainable) -> TrainingLoad:
            schemes = setting.source.schemes
            return training_load(setting.skeleton, schemes, training, tokens, text.ids.numel(), self.context.compute)

        choice = choose(self.stage.mode, setting.training, load_of, self.context.device)
        if path.is_file():
            # What is kept inside blocks decides seconds and memory only, so that is as much as fits now.
            begun = Choice(**json.loads(path.read_text(encoding="utf-8")))
            choice = replace(begun, kept_blocks=choice.kept_blocks)
        else:
            if choice.mode == "block" and setting.teacher.block_count != setting.skeleton.block_count:
                raise ResourceError(
                    f"recover: training the whole model takes about {choice.whole_model_bytes:,} bytes and "
                    f"{choice.free:,} are free. Block by block there would be no telling which of the source's "
                    f"{setting.teacher.block_count} blocks each of the {setting.skeleton.block_count} stands for. "
                    "Train less (lora, norms), or on a larger machine."
                )
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(path, dataclasses.asdict(choice))
        if choice.train != setting.training.what:
            needed = whole_model_training_bytes(load_of(setting.training))
            message = (
                f"training {setting.training.what} of the whole model takes about {needed:,} bytes, and "
                f"{choice.free:,} were free: {choice.train} were trained"
            )
            self.events.append(Event("recover_trained_less", "recover", message, {"bytes": needed}))
        if self.stage.mode == "auto" and choice.mode == "block":
            needed = choice.whole_model_bytes
            message = f"training the whole model takes about {needed:,} bytes, and {choice.free:,} were free"
            self.events.append(Event("recover_block_wise", "recover", message, {"bytes": needed}))
        return choice


def _changed(source: AsExported, values: dict[str, Tensor]) -> float:
    """Share of trained codes that are not what they were."""
    changed, count = 0, 0
    for name, codes in values.items():
        if name.endswith(".codes"):
            changed += int((codes != source.codes(name.removesuffix(".codes"))[0]).sum())
            count += codes.numel()
    return changed / max(1, count)


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
    prefix = source.architecture.block_name(index)
    quantised, records = {}, []
    for module in (f"{prefix}.{name}" for name in source.architecture.linears):
        scale = values.get(f"{module}.scale")
        if scale is not None:
            codes, grid = source.codes(module)
            quantised[module] = (values.get(f"{module}.codes", codes), dataclasses.replace(grid, scale=scale))
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
