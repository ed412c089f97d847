"""GPTQ, block by block: each linear is solved with the inputs it will really see, those of compressed blocks before.

Notation, as in `quantization.gptq`: H the mean outer product of a linear's inputs over the calibration tokens. Linears
that read the same input (q, k, v; gate, up) share one H and one factorisation and are solved as one stacked matrix.
The walk holds every batch at a group's input, so the statistics, the solve and the rest of the forward pass are one
pass. Beside it runs the source's own stream: comparing the two streams' inputs tells how to shift a linear's target so
that it undoes part of the error before it (`quantization.target_shift`). A block that is finished is written and never
solved again: a killed run redoes its forward and goes on.

Several processes (`compress.parallel`) walk a share of the batches each and add their statistics up; then all solve the
same problem, and the leader writes. The source's stream runs beside the same batches as in a single process.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from compress import parallel
from compress.architecture import InputGroup
from compress.calibration.statistics import InputStatistics
from compress.calibration.token_weights import TokenWeights, token_weights
from compress.calibration.walk import Arrival, Stream, forward_of, run_block, with_source_weights
from compress.calibration.windows import Windows
from compress.checkpoints.reader import Checkpoint
from compress.checkpoints.skeleton import Batch, Skeleton
from compress.events import Event
from compress.memory.measure import release
from compress.quantization.columns import column_kernel
from compress.quantization.gptq import Factor, ScaleSearch, Solution, factorise, solve
from compress.quantization.grid import Grid, dequantize
from compress.quantization.refine import Split
from compress.quantization.scheme import Scheme
from compress.quantization.target_shift import TOKENS_PER_COLUMN, Mismatch, Shift, shift_of
from compress.stages.base import StageContext, StageOutcome, restore
from compress.stages.quantize import QuantizeStage

WEIGHTS_SEED = 0
"""Of the labels that token weights are computed from."""
HELD_OUT = 8
"""The last of so many batches judge refinements; the source's stream never runs beside those."""
Quality = Literal["fast", "balanced", "max"]
PRESETS: dict[str, dict[str, Any]] = {
    "fast": {"target_shift": 0.0, "residual_shift": 0.0, "refine": False},
    "balanced": {},
    "max": {"shift_share": 1.0, "token_weights": True},
}
"""What each quality changes of the defaults; docs/benchmarks/ablation.md has the measurements behind it."""


class Gptq(QuantizeStage):
    """GPTQ with static activation order, shared Hessians and a weighted scale search."""

    kind: Literal["gptq"] = "gptq"
    quality: Quality = Field(
        default="balanced",
        description="fast: one stream of activations; balanced: targets shifted by the source's activations, refined; "
        "max: moreover token weights, and a `recover` stage after it. Fields that are given win over it",
    )
    damping: float = Field(default=0.01, gt=0, le=1, description="fraction of mean(diag H) added to the diagonal")
    scales: ScaleSearch = Field(
        default="weighted",
        description="weighted: range, sign and least squares by the cost of an error after feedback; mse; minmax",
    )
    target_shift: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="share of the error already in a linear's inputs that its target is moved to undo",
    )
    residual_shift: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="share of the residual stream's error that attention and MLP outputs are moved to undo; with both "
        "shifts 0 the source's activations are not computed",
    )
    shift_ridge: float = Field(default=0.1, ge=0, le=10, description="ridge of the shifts, fraction of mean(diag H)")
    shift_share: float = Field(
        default=0.5, gt=0, le=1, description="share of the calibration windows that shifts are computed from"
    )
    refine: bool = Field(
        default=True,
        description="fit scales together and revisit codes, kept for a linear where held-out windows agree",
    )
    token_weights: bool = Field(
        default=False, description="weigh calibration tokens by how much the output depends on them: a backward pass"
    )
    needs_calibration: ClassVar[bool] = True
    shares_windows: ClassVar[bool] = True

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, data: Any) -> Any:
        """Fill in what `quality` stands for, so that a resolved recipe says what ran."""
        if not isinstance(data, dict):
            return data
        return {**PRESETS.get(str(data.get("quality", "balanced")), {}), **data}

    @property
    def activation_streams(self) -> float:
        return 1 + (self.shift_share if self.shifts else 0)

    @property
    def shifts(self) -> bool:
        """Whether the source's own activations run beside the compressed ones."""
        return bool(self.target_shift or self.residual_shift)

    def apply(self, context: StageContext) -> StageOutcome:
        return _Run(self, context).blocks()


class _Run:
    """One application of the stage: the block loop, its clock and its ledger."""

    def __init__(self, stage: Gptq, context: StageContext) -> None:
        assert context.windows is not None, "the pipeline gives calibration windows to stages that need them"
        self.stage, self.context, self.windows = stage, context, context.windows
        self.source, self.output = context.source, context.output
        self.skeleton = Skeleton(self.source.config, context.device, context.compute)
        batches = self.windows.batches(context.tokens_at_once)
        self.batches: list[Batch] = parallel.share(batches)
        held_out = max(1, len(batches) // HELD_OUT) if stage.refine and len(batches) > 1 else 0
        self.refines = held_out > 0
        self.fitted = parallel.among_first(len(batches) - held_out)
        """Batches that refinements are computed from; the rest judge them."""
        shifting = min(len(batches) - held_out, max(1, round(stage.shift_share * len(batches)))) if stage.shifts else 0
        self.shifting_batches = parallel.among_first(shifting)
        self.shifting_tokens = sum(batch.tokens for batch in batches[:shifting])
        self.weights: TokenWeights | None = None
        self.seconds = {"forward": 0.0, "hessian": 0.0, "factorise": 0.0, "solve": 0.0, "write": 0.0}

    @torch.no_grad()
    def blocks(self) -> StageOutcome:
        modules: list[dict[str, Any]] = []
        events = _token_events(self.windows, self.skeleton) + kernel_events(self.context.device)
        if self.stage.refine and not self.refines:
            message = "one batch of calibration windows leaves none to judge a refinement by"
            events.append(Event("refinement_skipped", "calibration", message))
        if parallel.leads():
            self.output.write_outer(self.source)
        count = self.skeleton.block_count
        if self.stage.token_weights:
            started = time.perf_counter()
            progress = self.context.progress
            self.weights = token_weights(self.skeleton, self.source, self.batches, WEIGHTS_SEED, progress)
            self.seconds["token weights"] = time.perf_counter() - started
        with self._timed("forward"):
            states = self.skeleton.embed(self.source, self.batches)
        narrowest = min(columns for _, columns in self.skeleton.linear_shapes().values())
        reference = states[: self.shifting_batches] if self.can_shift(narrowest) else None

        with self.context.progress.task("gptq", count) as advance:
            for index in range(count):
                # Followers must not look themselves: the leader may write a block before they come to ask for it.
                record = parallel.from_leader(self.output.block_record(index) if parallel.leads() else None)
                if record is None:
                    states, reference, record = self._solve_block(index, states, reference)
                    self.context.after_block(index)
                elif index + 1 < count:
                    states = self._pass_through(index, states, Checkpoint(self.output.folder))
                    if reference is not None:
                        reference = self._pass_through(index, reference, self.source)
                release()
                done, happened = restore(record)
                modules += done
                events += happened
                advance(f"block {index + 1}/{count}")
        return StageOutcome(modules, events, self.seconds)

    def can_shift(self, columns: int) -> bool:
        """Whether the source's stream covers tokens enough to shift linears with `columns` inputs."""
        return self.stage.shifts and self.shifting_tokens >= TOKENS_PER_COLUMN * columns

    def _pass_through(self, index: int, states: list[Tensor], checkpoint: Checkpoint) -> list[Tensor]:
        """A finished block: its forward with weights already written."""
        forward = forward_of(self.skeleton, self.batches, index)
        prefix = self.skeleton.architecture.block_name(index)
        with self.skeleton.loaded(checkpoint, prefix) as block, self._timed("forward"):
            return [forward(block, number, hidden) for number, hidden in enumerate(states)]

    def _solve_block(
        self, index: int, states: list[Tensor], reference: list[Tensor] | None
    ) -> tuple[list[Tensor], list[Tensor] | None, dict[str, Any]]:
        """Solve one block and write it. Returns both streams' states after the block, and the block's record."""
        arch = self.skeleton.architecture
        prefix = arch.block_name(index)
        forward = forward_of(self.skeleton, self.batches, index)
        with self.skeleton.loaded(self.source, prefix) as block:
            work = _BlockWork(self, prefix, index, block)
            stream = Stream(block, states)
            beside = None if reference is None else Stream(with_source_weights(block), reference)
            started, others = time.perf_counter(), sum(self.seconds.values())
            run_block(stream, arch.groups, forward, work.on_input, work.on_group, beside)
            elapsed = time.perf_counter() - started
            self.seconds["forward"] += elapsed - (sum(self.seconds.values()) - others)
        names = [f"{prefix}.{name}" for name in arch.linears]
        work.events += self.stage.kept_events(names)
        record = {"modules": work.records, "events": [event.to_json() for event in work.events]}
        with self._timed("write"):
            if parallel.leads():
                self.output.write_block(self.source, index, work.quantised, record)
        return stream.states, beside.states if beside else None, record

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] += time.perf_counter() - started


class _BlockWork:
    """Statistics and solutions of one block while its forward passes are under way."""

    def __init__(self, run: _Run, prefix: str, index: int, block: nn.Module) -> None:
        self.run, self.prefix, self.index, self.block = run, prefix, index, block
        self.quantised: dict[str, tuple[Tensor, Grid]] = {}
        self.records: list[dict[str, Any]] = []
        self.events: list[Event] = []
        self._statistics: InputStatistics | None = None

    def on_input(self, group: InputGroup, number: int, here: Arrival, there: Arrival | None) -> None:
        if not any(self.run.stage.scheme_of(f"{self.prefix}.{name}") for name in group.linears):
            return
        with self.run._timed("hessian"):
            if self._statistics is None:
                self._statistics = InputStatistics(here.inputs.shape[-1], here.inputs.device)
            mask = self.run.batches[number].mask
            weights = self.run.weights[self.index, group.name][number] if self.run.weights else None
            if there is None or not self.run.can_shift(here.inputs.shape[-1]):
                held = number >= self.run.fitted
                (self._statistics.hold_out if held else self._statistics.add)(here.inputs, mask, weights)
                return
            residual = None
            if self.run.stage.residual_shift and here.residual is not None and there.residual is not None:
                residual = (here.residual, there.residual)
            self._statistics.add_pair(here.inputs, there.inputs, mask, residual, weights)

    def on_group(self, group: InputGroup) -> None:
        if self._statistics is None:
            return
        statistics, self._statistics = self._statistics, None
        with self.run._timed("hessian"):
            statistics.reduce()
        # The shift first: its sums are as large as H, and are gone before H is factorised.
        with self.run._timed("factorise"):
            shift = self._shift(statistics.mismatch())
            hessian, split = statistics.hessian()
            factor = factorise(hessian, self.run.stage.damping)
        self._note(group, hessian, factor)
        if factor is None:
            shift = None
        elif shift is None and self.run.stage.shifts:
            self._note_no_shift(group, len(hessian))
        # Only errors are measured with H from here on, in float32.
        hessian = hessian.float()
        by_scheme: dict[Scheme, list[str]] = {}
        for name in group.linears:
            scheme = self.run.stage.scheme_of(f"{self.prefix}.{name}")
            if scheme is not None:
                by_scheme.setdefault(scheme, []).append(name)
        for scheme, names in by_scheme.items():
            self._solve(names, scheme, hessian, factor, shift, split)

    def _shift(self, mismatch: Mismatch | None) -> Shift | None:
        """What moves the group's targets. Uses up the memory of `mismatch`."""
        stage = self.run.stage
        if mismatch is None:
            return None
        return shift_of(mismatch, stage.target_shift, stage.residual_shift, stage.shift_ridge)

    def _note_no_shift(self, group: InputGroup, columns: int) -> None:
        where, tokens = f"{self.prefix}.{'+'.join(group.linears)}", self.run.shifting_tokens
        reason = "no factor of its Hessian" if self.run.can_shift(columns) else f"{tokens} tokens for {columns} columns"
        self.events.append(Event("target_shift_skipped", where, f"target not shifted: {reason}"))

    def _note(self, group: InputGroup, hessian: Tensor, factor: Factor | None) -> None:
        where = f"{self.prefix}.{'+'.join(group.linears)}"
        if factor is None:
            finite = bool(torch.isfinite(hessian).all())
            reason = "no damping on the ladder made the Hessian definite" if finite else "its inputs are not finite"
            self.events.append(Event("rounding_fallback", where, f"rounded to nearest: {reason}"))
            return
        if factor.damping > self.run.stage.damping:
            message = f"damping raised from {self.run.stage.damping:g} to {factor.damping:g}"
            self.events.append(Event("damping_raised", where, message, {"damping": factor.damping}))
        if factor.dead:
            message = f"{factor.dead} of {len(factor.order)} input columns were never excited; rounded, not solved"
            self.events.append(Event("dead_columns", where, message, {"columns": factor.dead}))

    def _solve(
        self,
        names: list[str],
        scheme: Scheme,
        hessian: Tensor,
        factor: Factor | None,
        shift: Shift | None,
        split: Split | None,
    ) -> None:
        """Solve linears with one scheme together and put the values a runtime will see into the block."""
        transposed = self.run.skeleton.architecture.transposed_linears
        started = time.perf_counter()
        linears = [self.block.get_submodule(name) for name in names]
        stored = [linear.get_parameter("weight").data.float() for linear in linears]
        weights = [weight.T for weight in stored] if transposed else stored
        targets = weights if shift is None else [shift.target(weight) for weight in weights]
        solutions = solve(targets, hessian, factor, scheme, self.run.context.stored, self.run.stage.scales, split)
        for linear, solution in zip(linears, solutions, strict=True):
            value = dequantize(solution.codes, solution.grid).to(self.run.context.compute)
            linear.weight = nn.Parameter(value.T if transposed else value, requires_grad=False)
        spent = time.perf_counter() - started
        self.run.seconds["solve"] += spent
        rows = sum(weight.shape[0] for weight in weights)
        for name, weight, solution in zip(names, weights, solutions, strict=True):
            module = f"{self.prefix}.{name}"
            self.quantised[module] = (solution.codes, solution.grid)
            if solution.kept_rounding:
                self.events.append(Event("rounding_kept", module, "rounding was better than solving, and was kept"))
            share = spent * weight.shape[0] / rows
            self.records.append(self._record(module, scheme, solution, weight.shape, share, factor is None))

    def _record(
        self, module: str, scheme: Scheme, solution: Solution, shape: torch.Size, spent: float, fell_back: bool
    ) -> dict[str, Any]:
        rows, columns = shape
        return {
            "name": module,
            "block": self.index,
            "scheme": scheme.label,
            "error": solution.error,
            "rounding_error": solution.rounding_error,
            "damping": solution.damping,
            "refined": solution.refined,
            "seconds": spent,
            "effective_bits": 8 * scheme.stored_bytes(rows, columns) / (rows * columns),
            "events": ["rounding_fallback"] * fell_back + ["rounding_kept"] * solution.kept_rounding,
        }


def _token_events(windows: Windows, skeleton: Skeleton) -> list[Event]:
    """Fewer tokens than columns leave H rank deficient: damping then does the work, and the report should say so."""
    widest = max(columns for _, columns in skeleton.linear_shapes().values())
    if windows.tokens >= widest:
        return []
    message = f"{windows.tokens} calibration tokens for inputs of up to {widest} columns: the Hessian is rank deficient"
    return [Event("few_calibration_tokens", "calibration", message, {"tokens": windows.tokens, "columns": widest})]


def kernel_events(device: torch.device) -> list[Event]:
    """A GPU whose columns torch rounds: the same arithmetic, in many times the launches."""
    if device.type == "cpu" or column_kernel(device) == "triton":
        return []
    message = "triton is not installed, so torch rounds column by column; pip install 'compress-models[triton]'"
    return [Event("torch_columns", "gptq", message)]
