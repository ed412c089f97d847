"""Every linear in every candidate scheme, and what each would cost: what `mixed_precision` chooses from.

The source walks its own calibration windows once. Linears that read the same input share one H and one factorisation,
from which GPTQ's columns are solved for each candidate. What a candidate costs is 1/2 tr[G dW H dW^T] in nats a token
(`calibration.fisher`), with G, or its diagonal alone, from one backward pass over a few windows, as have the weights of
attention's tokens in H, and feedback along rows (`calibration.outputs`). Where inputs are integers too, the same is
added of W and S, the mean outer product of what rounding does to inputs. Inputs are the source's own: what a linear
would see behind compressed ones depends on a choice that is not made yet.

Second-order costs are then scaled, each unit's by a factor of its own, so that they agree with what the unit costs
alone: that is measured at one candidate (`alone`).

Embedding and head, where they are chosen for, are rounded as the `vocabulary` stage does it. What that costs is
measured on the tuning windows, each candidate alone: they are few, and an embedding is not a product.

The folder this writes is its input with `candidates/` beside it. It depends on no budget, so that another budget finds
it finished.
"""

from __future__ import annotations

from statistics import median
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from compress.calibration.outputs import Outputs, outputs_of, starts_of
from compress.calibration.products import chosen_for_walks
from compress.calibration.statistics import facts_of_products
from compress.calibration.walk import Stream, forward_of, run_block
from compress.checkpoints.candidates import (
    Assigned,
    alone_records,
    candidates_in,
    kept_bytes,
    outer_records,
    write_alone_records,
    write_candidates,
    write_outer_candidate,
    write_outer_records,
)
from compress.checkpoints.skeleton import Skeleton
from compress.events import Event
from compress.memory.measure import release
from compress.quantization.scheme import Option, Scheme, label_of
from compress.stages.alone import Tried, divergences_alone, factor, few_tokens, held_back
from compress.stages.base import Shapes, StageContext, StageOutcome, rank_deficient, restore
from compress.stages.candidates import CandidateStage
from compress.stages.sensitivity_block import BlockWork, record_of
from compress.stages.tuning import TuningText
from compress.stages.vocabulary import rounded_rows
from compress.training.clock import Clock


class Sensitivity(CandidateStage):
    """Solve every linear at every candidate scheme and say what each costs; added before `mixed_precision`."""

    kind: Literal["sensitivity"] = "sensitivity"
    gradient_windows: int = Field(
        default=16, ge=1, description="calibration windows of the backward pass that tells which outputs matter"
    )
    alone_tokens: int = Field(
        default=512,
        ge=0,
        description="tokens of the tuning windows on which each group of linears that is chosen for together is "
        "measured alone, at one candidate, to scale its costs by; 0: costs stay as predicted",
    )
    draws: ClassVar[bool] = True

    @property
    def tried_alone(self) -> int | None:
        """The number of the candidate that units are measured in: the fewest bits from 3 on, as far as there are; None
        where nothing is to be measured."""
        plain = [
            (each.bits, number)
            for number, each in enumerate(self.candidates)
            if each.bits < 16 and each.inputs == "none"
        ]
        if not (self.alone_tokens and plain):
            return None
        return min([each for each in plain if each[0] >= 3] or plain)[1]

    @property
    def forwards(self) -> float:
        # Each candidate of the vocabulary is a walk over the tuning windows, about an eighth of the text.
        return 2.0 + (len(self.candidates) / 8 if self.vocabulary else 0)

    def output_tokens_read(self, window_tokens: int) -> int:
        return self.gradient_windows * window_tokens

    def schemes(self, shapes: Shapes) -> dict[str, Scheme]:
        return {}

    def extra_disk_bytes(self, shapes: Shapes) -> int:
        found = [
            kept_bytes(option, rows, columns)
            for name, (rows, columns) in shapes.items()
            for option in self.options(name)
            if option is not None
        ]
        return sum(found) * 17 // 16  # Scales are small beside codes.

    def apply(self, context: StageContext) -> StageOutcome:
        return SensitivityRun(self, context).blocks()


class SensitivityRun:
    """One application of the stage."""

    def __init__(self, stage: Sensitivity, context: StageContext) -> None:
        assert context.windows is not None, "the pipeline gives calibration windows to stages that need them"
        self.stage, self.context, self.output = stage, context, context.output
        self.windows, tuning = stage.split(context.windows)
        self.tuning = TuningText(context, tuning)
        self.skeleton = Skeleton(context.source.config, context.device, context.compute)
        self.batches = self.windows.batches(context.tokens_at_once)
        self.starts = starts_of(self.batches)
        self.products = chosen_for_walks(stage.products, context.device, context.compute)
        outside = ("vocabulary",) if stage.vocabulary else ()
        self.clock = Clock("gradients", "forward", "hessian", "factorise", "solve", "write", "alone", *outside)

    @torch.no_grad()
    def blocks(self) -> StageOutcome:
        source, count = self.context.source, self.skeleton.block_count
        self.output.write_outer(source)
        if self.stage.vocabulary and outer_records(self.output.folder) is None:
            with self.clock.timed("vocabulary"):
                write_outer_records(self.output.folder, self._vocabulary())
        with self.clock.timed("gradients"):
            self.outputs = self._outputs()
        with self.clock.timed("forward"):
            states = self.skeleton.embed(source, self.batches)
        events = rank_deficient(self.windows, self.skeleton)
        with self.context.progress.task("sensitivity", count) as advance:
            for index in range(count):
                before = self.output.block_record(index)
                states, record = self._block(index, states, before)
                events += restore(record)[1]
                if before is None:
                    self.context.after_block(index)
                release()
                advance(f"block {index + 1}/{count}")
        del states
        with self.clock.timed("alone"):
            alone, held = self._alone()
            events += held
        gradient = min(self.stage.gradient_windows, len(self.windows.ids))
        facts = {
            "candidates": len(self.stage.candidates),
            "gradient_windows": gradient,
            "tokens": self.windows.tokens,
            **alone,
            **facts_of_products(self.products, self.context.device),
        }
        return StageOutcome([], events, self.clock.seconds, facts)

    def _outputs(self) -> Outputs:
        """What the output depends on; kept in the stage's scratch, for a run that is killed later."""
        folder, context, windows = self.output.scratch / "outputs", self.context, self.windows
        tokens = self.stage.output_tokens_read(windows.ids.shape[1])
        text = windows, tokens, context.tokens_at_once, context.seed
        return outputs_of(self.skeleton, context.source, *text, context.progress, folder, self.products)

    def _alone(self) -> tuple[dict[str, Any], list[Event]]:
        """Measure every unit alone, but for those that were measured before a kill; what the report says of it."""
        number, folder = self.stage.tried_alone, self.output.folder
        if number is None:
            return {}, []
        found = candidates_in(folder, self.skeleton.block_count)
        schemes = {
            module: [each["scheme"] and Scheme.from_json(each["scheme"]) for each in rows]
            for module, rows in found.items()
        }
        units = [
            unit
            for unit in self.stage.units(self.skeleton.architecture, self.skeleton.linear_shapes())
            if unit.block is not None
        ]
        text = few_tokens(self.tuning.windows, self.stage.alone_tokens)
        known = alone_records(folder)
        with self.context.progress.task("units alone", len(units)) as advance:
            for _ in known:
                advance("measured before")
            tried = [Tried(unit, number) for unit in units if unit.name not in known]
            for part in divergences_alone(self.context, folder, schemes, tried, text, advance):
                known |= {name: (number, kl) for name, kl in part.items()}
                write_alone_records(folder, known)
        predicted = [sum(found[module][number]["cost"] for module in unit.modules) for unit in units]
        measured = [known[unit.name][1] for unit in units]
        factors = [factor(*pair) for pair in zip(measured, predicted, strict=True)]
        events = [
            Event("alone_held_back", unit.name, f"measured alone {kl:.4g} nats a token, predicted {cost:.4g}")
            for unit, kl, cost in zip(units, measured, predicted, strict=True)
            if held_back(kl, cost)
        ]
        label = label_of(schemes[units[0].modules[0]][number]) if units else ""
        facts = {"alone_tokens": text.tokens, "measured_alone_at": label, "median_factor": median(factors or [1.0])}
        return facts, events

    def _vocabulary(self) -> dict[str, list[dict[str, Any]]]:
        """Candidates of the embedding and the head, each measured on its own."""
        source, stage, stored = self.context.source, self.stage, self.context.stored
        arch = self.skeleton.architecture
        names = [arch.embedding] if source.tied_head else [arch.embedding, arch.head]
        units = stage.units(arch, self.skeleton.linear_shapes() | {name: source.matrix_shape(name) for name in names})
        records: dict[str, list[dict[str, Any]]] = {}
        outside = [unit.modules[0] for unit in units if unit.block is None]
        total = sum(len(stage.options_of_vocabulary(module)) for module in outside)
        with self.context.progress.task("candidates of embedding and head", total) as advance:
            for module in outside:
                weight = source.dense(module)
                options = stage.options_of_vocabulary(module)
                records[module] = []
                for number, scheme in enumerate(options):
                    error, cost = 0.0, 0.0
                    if scheme is not None:
                        codes, grid, error = rounded_rows(weight, scheme, "mse", stored, self.context.device)
                        write_outer_candidate(self.output.folder, module, number, codes, grid)
                        cost = self._measured(module, options, number)
                    size = stage.option_bytes(scheme, (weight.shape[0], weight.shape[1]), stored.itemsize)
                    records[module].append(record_of(scheme, cost, error, size))
                    advance(f"{module}: {label_of(scheme)}")
        return records

    def _measured(self, module: str, options: list[Option], number: int) -> float:
        """The divergence (nats a token) of the model with one matrix in one of its candidates.

        The folder that is being written has no blocks yet, so its candidates are read into the model before it.
        """
        chosen = Assigned(self.context.source.folder, {module: options}, {module: number}, self.output.folder)
        return max(self.tuning.judge(chosen).kl, 0.0)

    def _block(
        self, index: int, states: list[Tensor], record: dict[str, Any] | None
    ) -> tuple[list[Tensor], dict[str, Any]]:
        """Candidates of one block, unless they were found before a kill; states after the block."""
        arch = self.skeleton.architecture
        prefix = arch.block_name(index)
        forward = forward_of(self.skeleton, self.batches, index, self.products)
        with self.skeleton.loaded(self.context.source, prefix) as block:
            if record is not None:
                with self.clock.timed("forward"):
                    return [forward(block, number, hidden) for number, hidden in enumerate(states)], record
            work = BlockWork(self, prefix, index, block)
            stream = Stream(block, states)
            with self.clock.remaining("forward"):
                run_block(stream, arch.groups, forward, work.on_input, work.on_group)
        record = {
            "modules": [],
            "events": [event.to_json() for event in work.events],
            "candidates": work.records,
        }
        with self.clock.timed("write"):
            write_candidates(self.output.folder, index, work.found)
            self.output.write_block(self.context.source, index, {}, record)
        return stream.states, record
