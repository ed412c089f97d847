"""Every linear in every candidate scheme, and what each would cost: what `mixed_precision` chooses from.

The source walks its own calibration windows once. Linears that read the same input share one H and one factorisation,
from which GPTQ's columns are solved for each candidate. What a candidate costs is 1/2 sum_r lambda_r dW_r H dW_r^T in
nats a token (`calibration.fisher`), with lambda from one backward pass over a few windows. Inputs are the source's own:
what a linear would see behind compressed ones depends on a choice that is not made yet.

The folder this writes is its input with `candidates/` beside it. It depends on no budget, so that another budget finds
it finished.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from compress.architecture import InputGroup
from compress.calibration.fisher import output_sensitivities, rounding_cost
from compress.calibration.statistics import InputStatistics
from compress.calibration.walk import Arrival, Stream, forward_of, run_block
from compress.checkpoints.candidates import write_candidates
from compress.checkpoints.skeleton import Skeleton
from compress.events import Event
from compress.files import atomic_path
from compress.memory.measure import release, trim
from compress.quantization.gptq import factorise, solve
from compress.quantization.grid import Grid, dequantize
from compress.quantization.scheme import Scheme
from compress.stages.base import Shapes, StageContext, StageOutcome, restore
from compress.stages.candidates import CandidateStage
from compress.training.clock import Clock

DAMPING = 0.01


class Sensitivity(CandidateStage):
    """Solve every linear at every candidate scheme and say what each costs; added before `mixed_precision`."""

    kind: Literal["sensitivity"] = "sensitivity"
    gradient_windows: int = Field(
        default=16, ge=1, description="calibration windows of the backward pass that tells which outputs matter"
    )
    draws: ClassVar[bool] = True

    @property
    def forwards(self) -> float:
        # The backward pass is of a few windows only, and its share is not known here.
        return 2.0

    def schemes(self, shapes: Shapes) -> dict[str, Scheme]:
        return {}

    def extra_disk_bytes(self, shapes: Shapes) -> int:
        # A byte a code; scales are small beside them.
        return sum(rows * columns * len(self.options(name)) for name, (rows, columns) in shapes.items()) * 17 // 16

    def apply(self, context: StageContext) -> StageOutcome:
        return _Run(self, context).blocks()


class _Run:
    """One application of the stage."""

    def __init__(self, stage: Sensitivity, context: StageContext) -> None:
        assert context.windows is not None, "the pipeline gives calibration windows to stages that need them"
        self.stage, self.context, self.output = stage, context, context.output
        self.windows, _ = stage.split(context.windows)
        self.skeleton = Skeleton(context.source.config, context.device, context.compute)
        self.batches = self.windows.batches(context.tokens_at_once)
        self.clock = Clock("gradients", "forward", "hessian", "factorise", "solve", "write")
        self.sensitivities: dict[str, Tensor] = {}

    @torch.no_grad()
    def blocks(self) -> StageOutcome:
        source, count = self.context.source, self.skeleton.block_count
        self.output.write_outer(source)
        self.sensitivities = self._sensitivities()
        with self.clock.timed("forward"):
            states = self.skeleton.embed(source, self.batches)
        events: list[Event] = []
        with self.context.progress.task("sensitivity", count) as advance:
            for index in range(count):
                before = self.output.block_record(index)
                states, record = self._block(index, states, before)
                events += restore(record)[1]
                if before is None:
                    self.context.after_block(index)
                release()
                advance(f"block {index + 1}/{count}")
        gradient = min(self.stage.gradient_windows, len(self.windows.ids))
        facts = {"candidates": len(self.stage.candidates), "gradient_windows": gradient, "tokens": self.windows.tokens}
        return StageOutcome([], events, self.clock.seconds, facts)

    def _sensitivities(self) -> dict[str, Tensor]:
        """lambda of every linear; kept in the stage's scratch, for a run that is killed later."""
        path = self.output.scratch / "outputs.safetensors"
        if path.is_file():
            kept: dict[str, Tensor] = load_file(path)
            return kept
        few = self.windows.first(self.stage.gradient_windows)
        with self.clock.timed("gradients"):
            found = output_sensitivities(
                self.skeleton,
                self.context.source,
                few.batches(self.context.tokens_at_once),
                self.context.seed,
                self.context.progress,
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            save_file(found, temporary)
        return found

    def _block(
        self, index: int, states: list[Tensor], record: dict[str, Any] | None
    ) -> tuple[list[Tensor], dict[str, Any]]:
        """Candidates of one block, unless they were found before a kill; states after the block."""
        arch = self.skeleton.architecture
        prefix = arch.block_name(index)
        forward = forward_of(self.skeleton, self.batches, index)
        with self.skeleton.loaded(self.context.source, prefix) as block:
            if record is not None:
                with self.clock.timed("forward"):
                    return [forward(block, number, hidden) for number, hidden in enumerate(states)], record
            work = _Block(self, prefix, block)
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


class _Block:
    """Statistics and candidates of one block while its forward passes are held."""

    def __init__(self, run: _Run, prefix: str, block: nn.Module) -> None:
        self.run, self.prefix, self.block = run, prefix, block
        self.found: dict[str, list[tuple[Tensor, Grid]]] = {}
        self.records: dict[str, list[dict[str, Any]]] = {}
        self.events: list[Event] = []
        self._statistics: InputStatistics | None = None

    def on_input(self, group: InputGroup, number: int, here: Arrival, there: Arrival | None) -> None:
        with self.run.clock.timed("hessian"):
            if self._statistics is None:
                self._statistics = InputStatistics(here.inputs.shape[-1], here.inputs.device)
            self._statistics.add(here.inputs, self.run.batches[number].mask)

    def on_group(self, group: InputGroup) -> None:
        assert self._statistics is not None
        statistics, self._statistics = self._statistics, None
        stage, clock = self.run.stage, self.run.clock
        names = [name for name in group.linears if stage.options(f"{self.prefix}.{name}")]
        if not names:
            return
        trim()
        with clock.timed("factorise"):
            hessian, _ = statistics.hessian()
            factor = factorise(hessian, DAMPING)
            single = hessian.float()
        if factor is None:
            where = f"{self.prefix}.{'+'.join(names)}"
            message = "candidates rounded to nearest: no damping on the ladder made the Hessian definite"
            self.events.append(Event("rounding_fallback", where, message))
        transposed = self.run.skeleton.architecture.transposed_linears
        stored = [self.block.get_submodule(name).get_parameter("weight").data.float() for name in names]
        weights = [weight.T.contiguous() if transposed else weight for weight in stored]
        for number in range(len(stage.candidates)):
            schemes = [stage.options(f"{self.prefix}.{name}")[number] for name in names]
            for scheme in dict.fromkeys(schemes):
                which = [at for at, each in enumerate(schemes) if each == scheme]
                with clock.timed("solve"):
                    solutions = solve([weights[at] for at in which], single, factor, scheme, self.run.context.stored)
                    for at, solution in zip(which, solutions, strict=True):
                        self._keep(f"{self.prefix}.{names[at]}", weights[at], single, solution, scheme)

    def _keep(self, module: str, weight: Tensor, hessian: Tensor, solution: Any, scheme: Scheme) -> None:
        difference = dequantize(solution.codes, solution.grid).float() - weight
        cost = rounding_cost(difference, hessian, self.run.sensitivities[module])
        self.found.setdefault(module, []).append((solution.codes, solution.grid))
        self.records.setdefault(module, []).append(
            {
                "scheme": scheme.to_json(),
                "cost": cost,
                "error": solution.error,
                "bytes": self.run.stage.format.stored_bytes(
                    scheme, weight.shape[0], weight.shape[1], self.run.context.stored.itemsize
                ),
            }
        )
