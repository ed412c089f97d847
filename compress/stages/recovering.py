"""How `recover` trains: its text, how much of the model at once, and what of it ships.

A killed run goes on from files in the stage's scratch folder, which is removed when the stage is finished: `sampled`
(text of the model's own), `mode.json` (how it was begun), those of `training`, and `result` once there is one.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from compress.calibration.products import chosen
from compress.calibration.self_generated import sample_windows
from compress.calibration.texts import SelfGenerated
from compress.calibration.window_specs import DOCUMENT_TOKENS, WindowSpec
from compress.calibration.windows import Windows
from compress.checkpoints.skeleton import Skeleton
from compress.errors import ResourceError
from compress.events import Event
from compress.files import digest_of_json, write_json
from compress.memory.predict import TrainingLoad, whole_model_training_bytes
from compress.stages.base import StageContext, StageOutcome, restore
from compress.stages.data_free import module_record
from compress.training import saved
from compress.training.block_wise import train_block_wise
from compress.training.clock import Clock
from compress.training.descent import Course
from compress.training.footprint import Choice, choose, training_load
from compress.training.material import Material, material
from compress.training.setting import Setting
from compress.training.student import AsExported
from compress.training.trained import Trainable
from compress.training.whole_model import train_whole_model

if TYPE_CHECKING:
    from compress.stages.recover import Recover


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


class Run:
    """One application of the stage: its text, its models, its clock and its ledger."""

    def __init__(self, stage: Recover, context: StageContext) -> None:
        assert context.windows is not None, "the pipeline gives calibration windows to stages that need them"
        assert context.source.schemes or not stage.needs_codes, "plan refuses a recipe where nothing was quantised"
        self.stage, self.context, self.windows = stage, context, context.windows
        self.folder = context.output.scratch
        self.clock = Clock()
        self.events: list[Event] = []

    def outcome(self) -> StageOutcome:
        """Train, or take what a killed run had trained, and write it."""
        path = self.folder / "result.safetensors"
        found = saved.load(path)
        if found is None:
            result = self._result()
            saved.save(path, result.values, result.to_json() | {"seconds": self.clock.seconds})
        else:
            result = _Result.restored(*found)
            self.clock.carry(found[1]["seconds"])
        with self.clock.timed("write"):
            modules = _write(self.context, result.values)
        return StageOutcome(modules, result.events, self.clock.seconds, result.facts, self.clock.carried)

    def _result(self) -> _Result:
        """Train, and decide what ships."""
        if (self.folder / "mode.json").is_file():
            message = "an interrupted run had begun to train; this stage's seconds include its up to its last save"
            self.events.append(Event("training_resumed", "recover", message))
        more, ledger = self._sampled()
        share = self.stage.share_held_out(self.windows.tokens)
        fitted = bool(self.context.source.schemes)
        text = material(self.windows, more, share, self.stage.batch_tokens, self.context.seed, fitted)
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
            "held_out_from": "self_generated" if text.unseen else "calibration",
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
                message = "every code is what it was in the best state: steps too few or too small, or none that helped"
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
            ledger = found[1]
            self.clock.carry(ledger.pop("seconds"))
            return Windows(found[0]["ids"], None, ledger), ledger
        with self.clock.timed("sampling"):
            windows = self._sample()
        saved.save(path, {"ids": windows.ids}, windows.ledger | {"seconds": self.clock.seconds})
        return windows, windows.ledger

    def _sample(self) -> Windows:
        from transformers import AutoTokenizer

        # A seed of its own: the calibration text may have been sampled from the same model with the recipe's, and what
        # judges here must not have trained in an earlier `recover`.
        seed = int(digest_of_json([self.context.seed, self.windows.digest, len(self.context.chain)])[:12], 16)
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
            quantised[module] = (values.get(f"{module}.codes", codes), grid.with_free_scales(scale.float()))
            records.append(module_record(module, index, source.schemes[module], tuple(codes.shape), None, 0.0))
    record: dict[str, Any] = {"modules": records, "events": []}
    context.output.write_block(source, index, quantised, record, values)
    return record
