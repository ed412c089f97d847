"""GPTQ, block by block: each linear is solved with the inputs it will really see, those of compressed blocks before.

Notation, as in `quantization.gptq`: H the mean outer product of a linear's inputs over the calibration tokens. Linears
that read the same input (q, k, v; gate, up) share one H and one factorisation and are solved as one stacked matrix.
The walk holds every batch at a group's input, so the statistics, the solve and the rest of the forward pass are one
pass. Before it a backward pass over a few windows tells which tokens attention depends on, and how the outputs of a
head matter together, so that rows make up for each other as columns do (`calibration.outputs`,
`quantization.row_feedback`). Beside it runs the source's own stream: comparing the two streams' inputs tells how to
shift a linear's target so that it undoes part of the error before it (`quantization.target_shift`). A block that is
finished is written and never solved again: a killed run redoes its forward and goes on.

Several processes (`compress.parallel`) walk a share of the batches each and add their statistics up; then all solve the
same problem, and the leader writes. The source's stream runs beside the same batches as in a single process.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from compress import parallel
from compress.calibration.outputs import Outputs, outputs_of, starts_of
from compress.calibration.products import WHILE_WALKING, Products, chosen_for_walks
from compress.calibration.statistics import facts_of_products
from compress.calibration.token_weights import TokenWeights, token_weights
from compress.calibration.walk import (
    Stream,
    forward_of,
    kept_on_host,
    like,
    replay_block,
    run_block,
    with_source_weights,
)
from compress.checkpoints.overlap import ReadAhead, WriteBehind
from compress.checkpoints.reader import Checkpoint
from compress.checkpoints.skeleton import Batch, Skeleton
from compress.events import Event
from compress.memory.measure import release
from compress.quantization.columns import column_kernel
from compress.quantization.gptq import ScaleSearch
from compress.quantization.target_shift import TOKENS_PER_COLUMN
from compress.stages.base import StageContext, StageOutcome, rank_deficient, restore
from compress.stages.gptq_block import BlockWork
from compress.stages.quantize import QuantizeStage
from compress.training.clock import Clock

WEIGHTS_SEED = 0
"""Of the labels that token weights are computed from."""
OUTPUTS_SEED = 1
"""Of those that the backward pass over `output_tokens` starts from."""
BATCHES = 8
"""Batches that a text of as many windows is cut into at least, so that shares of it can be told apart on any device."""
HELD_OUT = 8
"""The last of so many batches judge refinements; the source's stream never runs beside those."""
REPLAYED = 2.3
"""Forward passes of a block that is run again up to each group of its linears: once whole, and the parts before."""
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
    output_tokens: int = Field(
        default=8192,
        ge=0,
        description="calibration tokens of a backward pass, which tells which tokens attention depends on and how the "
        "outputs of a linear, or of a head of queries or keys, matter together; 0 leaves both out",
    )
    token_weights: bool = Field(
        default=False, description="weigh calibration tokens by how much the output depends on them: a backward pass"
    )
    products: Products = Field(default="float32", description=WHILE_WALKING)
    low_memory: bool = Field(
        default=False,
        description="keep only the hidden states between blocks, on the host, and run a block again for each group of "
        "its linears; the same result for 2.3 forward passes in place of one",
    )
    needs_calibration: ClassVar[bool] = True
    batches_at_least: ClassVar[int] = BATCHES
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
    def forwards(self) -> float:
        # Token weights: forward, forward again with gradients, and a backward pass, which counts twice.
        passes = REPLAYED if self.low_memory else 1
        return self.activation_streams * passes + (4 if self.token_weights else 0)

    def output_tokens_read(self, window_tokens: int) -> int:
        return self.output_tokens

    @property
    def replays(self) -> bool:
        return self.low_memory

    @property
    def refines(self) -> bool:
        return self.refine

    @property
    def shifts(self) -> bool:
        """Whether the source's own activations run beside the compressed ones."""
        return bool(self.target_shift or self.residual_shift)

    def apply(self, context: StageContext) -> StageOutcome:
        return GptqRun(self.planned(context.source), context).blocks()


class GptqRun:
    """One application of the stage: the block loop, its clock and its ledger. `gptq_block` solves inside a block."""

    def __init__(self, stage: Gptq, context: StageContext) -> None:
        assert context.windows is not None, "the pipeline gives calibration windows to stages that need them"
        self.stage, self.context, self.windows = stage, context, context.windows
        self.source, self.output = context.source, context.output
        self.skeleton = Skeleton(self.source.config, context.device, context.compute)
        batches = self.windows.batches(context.tokens_at_once, BATCHES)
        self.batches: list[Batch] = parallel.share(batches)
        self.starts = parallel.share(starts_of(batches))
        held_out = max(1, len(batches) // HELD_OUT) if stage.refine and len(batches) > 1 else 0
        self.refines = held_out > 0
        self.fitted = parallel.among_first(len(batches) - held_out)
        """Batches that refinements are computed from; the rest judge them."""
        shifting = min(len(batches) - held_out, max(1, round(stage.shift_share * len(batches)))) if stage.shifts else 0
        self.shifting_batches = parallel.among_first(shifting)
        self.shifting_tokens = sum(batch.tokens for batch in batches[:shifting])
        self.products = chosen_for_walks(stage.products, context.device, context.compute)
        self.weights: TokenWeights | None = None
        self.outputs: Outputs | None = None
        names = [self.skeleton.architecture.block_name(index) for index in range(self.skeleton.block_count)]
        self.ahead = ReadAhead(self.source, names, context.device, context.compute)
        self.behind = WriteBehind(context.device)
        before = ("outputs",) if stage.output_tokens else ()
        parts = ("read", *before, "forward", "hessian", "factorise", "solve", "write")
        self.clock = Clock(*parts, device=context.device)

    @torch.no_grad()
    def blocks(self) -> StageOutcome:
        modules: list[dict[str, Any]] = []
        events = rank_deficient(self.windows, self.skeleton) + kernel_events(self.context.device)
        if self.stage.refine and not self.refines:
            message = "one batch of calibration windows leaves none to judge a refinement by"
            events.append(Event("refinement_skipped", "calibration", message))
        count = self.skeleton.block_count
        if self.stage.token_weights:
            started = time.perf_counter()
            progress = self.context.progress
            text = self.batches, WEIGHTS_SEED, progress, self.products
            self.weights = token_weights(self.skeleton, self.source, *text)
            self.clock.add("token weights", time.perf_counter() - started)
            events += _weight_events(self.weights, self.skeleton)
        if self.stage.output_tokens:
            with self.clock.timed("outputs"):
                self.outputs = self._outputs()
        with self.clock.timed("forward"):
            states = self.skeleton.embed(self.source, self.batches)
        narrowest = min(columns for _, columns in self.skeleton.linear_shapes().values())
        reference = states[: self.shifting_batches] if self.can_shift(narrowest) else None
        if self.stage.low_memory:
            states = [kept_on_host(each) for each in states]
            reference = None if reference is None else [kept_on_host(each) for each in reference]

        with self.context.progress.task("gptq", count) as advance, self.ahead, self.behind:
            if parallel.leads():
                self.behind.do(partial(self.output.write_outer, self.source))
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
        # The leader removes what all have read from.
        parallel.from_leader(None)
        facts = facts_of_products(self.products, self.context.device)
        return StageOutcome(modules, events, self.clock.seconds, facts)

    def _outputs(self) -> Outputs:
        """What the output depends on, as a killed run had found it where that is known."""
        folder, context = self.output.scratch / "outputs", self.context
        text = self.windows, self.stage.output_tokens, context.tokens_at_once
        return outputs_of(self.skeleton, self.source, *text, OUTPUTS_SEED, context.progress, folder, self.products)

    def can_shift(self, columns: int) -> bool:
        """Whether the source's stream covers tokens enough to shift linears with `columns` inputs."""
        return self.stage.shifts and self.shifting_tokens >= TOKENS_PER_COLUMN * columns

    def _pass_through(self, index: int, states: list[Tensor], checkpoint: Checkpoint) -> list[Tensor]:
        """A finished block: its forward with weights already written."""
        forward = forward_of(self.skeleton, self.batches, index, self.products)
        prefix = self.skeleton.architecture.block_name(index)
        with self.skeleton.loaded(checkpoint, prefix) as block, self.clock.timed("forward"):
            return [
                like(hidden, forward(block, number, hidden.to(self.skeleton.device)))
                for number, hidden in enumerate(states)
            ]

    def _solve_block(
        self, index: int, states: list[Tensor], reference: list[Tensor] | None
    ) -> tuple[list[Tensor], list[Tensor] | None, dict[str, Any]]:
        """Solve one block and write it. Returns both streams' states after the block, and the block's record."""
        arch = self.skeleton.architecture
        prefix = arch.block_name(index)
        forward = forward_of(self.skeleton, self.batches, index, self.products)
        with self.clock.timed("read"):
            state = self.ahead.state(prefix)
        with self.skeleton.loaded(self.source, prefix, state) as block:
            del state
            work = BlockWork(self, prefix, index, block)
            stream = Stream(block, states)
            beside = None if reference is None else Stream(with_source_weights(block), reference)
            with self.clock.remaining("forward"):
                walk = replay_block if self.stage.low_memory else run_block
                walk(stream, arch.groups, forward, work.on_input, work.on_group, beside)
        names = [f"{prefix}.{name}" for name in arch.linears]
        work.events += self.stage.kept_events(names)
        record = {"modules": work.records, "events": [event.to_json() for event in work.events]}
        with self.clock.timed("write"):
            if parallel.leads():
                self.behind.do(partial(self.output.write_block, self.source, index, work.quantised, record))
        return stream.states, beside.states if beside else None, record


def _weight_events(weights: TokenWeights, skeleton: Skeleton) -> list[Event]:
    """Groups whose gradients said nothing: every token then counts the same."""
    return [
        Event("token_weights_skipped", f"{skeleton.architecture.block_name(block)}.{group}", "gradients not usable")
        for (block, group), values in sorted(weights.items())
        if all(bool((value == 1).all()) for value in values)
    ]


def kernel_events(device: torch.device) -> list[Event]:
    """A device whose columns torch rounds: the same arithmetic, in many times the calls."""
    if column_kernel(device) != "torch":
        return []
    package = "numba" if device.type == "cpu" else "triton"
    remedy = f"pip install 'compress-models[{package}]'"
    message = f"{package} is not installed or does not import, so torch rounds column by column; {remedy}"
    return [Event("torch_columns", "gptq", message)]
