"""Structured pruning: whole blocks, MLP channels and KV heads go, and what stays is refitted to make up for them.

1. Blocks go by measured divergence (`depth`).
2. One walk over the blocks that stay, with the source's own activations beside. When a linear that reads channels or
   heads is reached, the least useful of them are chosen (`pruning.choose`) and the linear is refitted by least squares
   (`pruning.refit`) to what it should put out: with x~, r~ the source's input and residual stream and x, r the pruned
   model's, that is W x~ + (r~ - r), so that a linear also makes up for what blocks before it lost. How far it goes
   there, windows held out for it decide (`pruning.follow`).
3. Only then are tensors sliced (`pruning.surgery`) and the block written. All blocks keep the same numbers of pieces,
   not the same pieces, so the result is a plain checkpoint with smaller numbers in its config.

A killed run lays the written blocks back into blocks of the old size, in which the same arithmetic gives the same bits.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from compress.architecture import Architecture, dimensions_of
from compress.calibration.products import WHILE_WALKING, Products, chosen_for_walks
from compress.calibration.statistics import facts_of_products
from compress.calibration.walk import Stream, forward_of, run_block, with_source_weights
from compress.calibration.windows import HELD_OUT, Windows, kept_out
from compress.checkpoints.reader import Checkpoint
from compress.checkpoints.skeleton import Batch, Skeleton, load_module
from compress.errors import RecipeError
from compress.memory.measure import release
from compress.pruning.choose import Importance
from compress.pruning.counts import Counts, Model, Part, Target, counts_for, multiple_for, pruned_config
from compress.pruning.surgery import Cut, Kind, laid_back
from compress.quantization.scheme import Scheme
from compress.quantization.target_shift import TOKENS_PER_COLUMN
from compress.stages.base import Shapes, Stage, StageContext, StageOutcome, rank_deficient, restore
from compress.stages.depth import DepthSearch, Removal, facts_of
from compress.stages.prune_block import BlockWork, Place
from compress.training.clock import Clock

BATCHES = 8
"""Batches that a text of as many windows is cut into at least."""


class StructuredPrune(Stage):
    """Remove blocks, MLP channels or KV heads, and refit what stays; a plain, smaller checkpoint comes out."""

    kind: Literal["structured_prune"] = "structured_prune"
    target: Target | None = Field(default=None, description="ratio, parameters or weight_bytes, taken from `parts`")
    parts: tuple[Part, ...] = Field(
        default=("mlp",), min_length=1, description="what a target is taken from: depth, mlp, heads"
    )
    blocks: int | None = Field(default=None, ge=1, description="blocks that stay, instead of a target or beside it")
    kv_heads: int | None = Field(default=None, ge=1, description="KV heads that stay in each block, with their queries")
    mlp_channels: int | None = Field(default=None, ge=1, description="channels of the MLP that stay in each block")
    multiple: int | None = Field(
        default=None, ge=1, description="what the MLP's width stays a multiple of; left out: up to 128 by its size"
    )
    importance: Importance = Field(
        default="obs", description="obs: the error left after refitting; activation, magnitude: for comparison"
    )
    compensate: bool = Field(default=True, description="refit the linears that stay by least squares")
    ridge: float = Field(default=0.01, gt=0, le=1, description="ridge of choice and refit, fraction of mean(diag H)")
    follow_source: bool = Field(
        default=True,
        description="refit towards the source's activations, as far as calibration windows held out for it agree",
    )
    products: Products = Field(default="float32", description=WHILE_WALKING)
    tuning_windows: int = Field(
        default=4, ge=1, description="calibration windows kept apart, on which removals of blocks are measured"
    )
    compare: bool = Field(
        default=True,
        description="also quantise the source alone to the bytes that the run reaches, and print both in the report",
    )
    needs_calibration: ClassVar[bool] = True
    batches_at_least: ClassVar[int] = BATCHES
    draws: ClassVar[bool] = True

    @model_validator(mode="after")
    def _something(self) -> StructuredPrune:
        if self.target is None and self.blocks is None and self.kv_heads is None and self.mlp_channels is None:
            raise ValueError("say how much goes: a target, or what stays (blocks, kv_heads, mlp_channels)")
        return self

    @property
    def needs_weights(self) -> bool:
        return True

    @property
    def activation_streams(self) -> float:
        return 2 if self.shifts else 1

    @property
    def compares(self) -> bool:
        return self.compare

    @property
    def judges_shifts(self) -> bool:
        return self.shifts

    @property
    def shifts(self) -> bool:
        """Whether the source's own activations run beside."""
        return self.compensate and self.follow_source

    def check(self, shapes: Shapes, architecture: Architecture) -> list[str]:
        del shapes, architecture
        return []  # `configured` knows the config, which decides

    def schemes(self, shapes: Shapes) -> dict[str, Scheme]:
        del shapes
        return {}

    def configured(self, config: dict[str, Any], stored_bytes: int) -> dict[str, Any]:
        return self._configured(config, stored_bytes, 0)

    def other_configs(self, config: dict[str, Any], stored_bytes: int) -> list[dict[str, Any]]:
        """Of blocks from the second on, and of the last, where `configured` takes the first: a pattern of layers moves
        by one, or by all that go, so they show whether it matters which ones do."""
        skeleton = Skeleton(config, torch.device("cpu"), torch.float32)
        gone = skeleton.block_count - self.counts(skeleton, stored_bytes).blocks
        return [self._configured(config, stored_bytes, start) for start in sorted({1, gone})] if gone else []

    def _configured(self, config: dict[str, Any], stored_bytes: int, start: int) -> dict[str, Any]:
        """The config where blocks from `start` on stay."""
        skeleton = Skeleton(config, torch.device("cpu"), torch.float32)
        counts = self.counts(skeleton, stored_bytes)
        return pruned_config(
            config,
            skeleton.config,
            skeleton.architecture,
            dimensions_of(skeleton.config),
            counts,
            range(start, start + counts.blocks),
        )

    def counts(self, skeleton: Skeleton, stored_bytes: int) -> Counts:
        """What stays. Raises RecipeError with every mistake."""
        architecture, dimensions = skeleton.architecture, dimensions_of(skeleton.config)
        model = Model.of(skeleton.config_json, dimensions, skeleton.parameter_shapes())
        mistakes = self._mistakes(model, architecture)
        if mistakes:
            raise RecipeError(mistakes)
        now = model.counts
        explicit = Counts(self.blocks or now.blocks, self.kv_heads or now.kv_heads, self.mlp_channels or now.channels)
        given = {"depth": self.blocks, "heads": self.kv_heads, "mlp": self.mlp_channels}
        parts = [part for part in self.parts if given[part] is None]
        if self.target is not None and not parts:
            raise RecipeError(
                "target: every part that it could be taken from is given by number; leave one of them out"
            )
        multiple = multiple_for(dimensions.mlp_width, self.multiple)
        counts = counts_for(model, self.target, parts, explicit, multiple, stored_bytes)
        if counts == now:
            raise RecipeError("nothing goes: the model is no larger than that already; ask for less to stay")
        return counts

    def _mistakes(self, model: Model, architecture: Architecture) -> list[str]:
        able = ["depth", *model.kinds]
        used = {*(self.parts if self.target else ())}
        used |= {"heads"} if self.kv_heads else set()
        used |= {"mlp"} if self.mlp_channels else set()
        found = [
            f"{part}: the config of {architecture.model_type} cannot express a model with fewer of them. Parts that "
            f"can be pruned: {', '.join(able)}"
            for part in sorted(used - set(able))
        ]
        now = model.counts
        limits = (("blocks", self.blocks, now.blocks), ("kv_heads", self.kv_heads, now.kv_heads))
        for field, value, most in (*limits, ("mlp_channels", self.mlp_channels, now.channels)):
            if value is not None and value > most:
                found.append(f"{field}: {value} should stay, and the model has {most}")
        asked = self.kv_heads if "heads" in model.kinds else None
        if asked and asked <= now.kv_heads and asked not in model.head_counts:
            found.append(
                f"kv_heads: a {architecture.model_type} config does not take {asked} KV heads with their query heads; "
                f"it takes {', '.join(map(str, model.head_counts))}"
            )
        if self.mlp_channels and self.multiple and self.mlp_channels % self.multiple:
            found.append(f"mlp_channels: {self.mlp_channels} is no multiple of {self.multiple}; leave multiple out")
        return found

    def split(self, windows: Windows, seed: int) -> tuple[Windows, Windows | None, Windows | None]:
        """Windows that weights are fitted to; those that say how far to follow the source, None where there is but one;
        and those that removals of blocks are measured on, where blocks go."""
        takes_blocks = self.blocks is not None or bool(self.target and "depth" in self.parts)
        fitted, tuning = windows.apart(self.tuning_windows) if takes_blocks else (windows, None)
        if len(fitted.ids) < 2:
            return fitted, None, tuning
        # Of all windows, so that stages that train afterwards keep the same ones out.
        inside, outside = kept_out(len(windows.ids), HELD_OUT, seed)
        inside, outside = inside[inside < len(fitted.ids)], outside[outside < len(fitted.ids)]
        if not len(outside):
            inside, outside = inside[:-1], inside[-1:]
        if not len(inside):
            inside, outside = outside[:-1], outside[-1:]
        return fitted.rows(inside), fitted.rows(outside), tuning

    def apply(self, context: StageContext) -> StageOutcome:
        return PruneRun(self, context).blocks()


class PruneRun:
    """One application of the stage: the block loop, its clock and its ledger."""

    def __init__(self, stage: StructuredPrune, context: StageContext) -> None:
        assert context.windows is not None, "the pipeline gives calibration windows to stages that need them"
        self.stage, self.context, self.source, self.output = stage, context, context.source, context.output
        self.windows, held_out, self.tuning = stage.split(context.windows, context.seed)
        self.skeleton = Skeleton(self.source.config, context.device, context.compute)
        self.architecture = self.skeleton.architecture
        self.dimensions = dimensions_of(self.skeleton.config)
        self.batches: list[Batch] = self.windows.batches(context.tokens_at_once, BATCHES)
        self.fitted = len(self.batches)
        """Batches that weights are fitted to; those after them say how far to follow the source."""
        self.batches += held_out.batches(context.tokens_at_once) if held_out else []
        self.products = chosen_for_walks(stage.products, context.device, context.compute)
        self.counts = stage.counts(self.skeleton, context.stored.itemsize)
        model = Model.of(self.source.config, self.dimensions, self.skeleton.parameter_shapes())
        self.model = model
        self.kinds: dict[str, tuple[Kind, int]] = {}
        """By the name of the linear that reads them: pieces that go, and how many stay."""
        staying = {"heads": self.counts.kv_heads, "mlp": self.counts.channels}
        for name, kind in model.kinds.items():
            if staying[name] < kind.pieces:
                self.kinds[kind.removable.reader] = kind, staying[name]
        self.clock = Clock("depth", "forward", "hessian", "choose", "refit", "write")

    @torch.no_grad()
    def blocks(self) -> StageOutcome:
        removals = self._removals()
        gone = {removal.block for removal in removals}
        staying = [index for index in range(self.skeleton.block_count) if index not in gone]
        config = pruned_config(
            self.source.config, self.skeleton.config, self.architecture, self.dimensions, self.counts, staying
        )
        self.output.write_outer(self.source, config=config)
        places = {before: Place(before, after) for after, before in enumerate(staying)}
        events = rank_deficient(self.windows, self.skeleton)
        blocks: list[dict[str, Any]] = []
        shares: list[dict[str, Any]] = []
        with self.clock.timed("forward"):
            states = self.skeleton.embed(self.source, self.batches)
        reference = list(states) if self.stage.shifts and (self.kinds or gone) else None
        with self.context.progress.task("structured_prune", self.skeleton.block_count) as advance:
            for index in range(self.skeleton.block_count):
                place = places.get(index)
                if place is None:
                    reference = None if reference is None else self._through(index, reference)
                else:
                    states, reference, record = self._block(place, states, reference)
                    blocks += record["pruned"]
                    shares += record["shares"]
                    events += restore(record)[1]
                release()
                advance(f"block {index + 1}/{self.skeleton.block_count}")
        return StageOutcome([], events, self.clock.seconds, self._facts(removals, blocks, shares))

    def _removals(self) -> list[Removal]:
        count = self.dimensions.blocks - self.counts.blocks
        if not count:
            return []
        assert self.tuning is not None, "blocks go only where the recipe says so, and windows are then kept apart"
        search = DepthSearch(self.context, self.tuning, self.output.scratch / "removed.json")
        with self.context.progress.task("blocks to remove", count) as advance, self.clock.timed("depth"):
            return search.removed(count, advance)

    def _through(self, index: int, states: list[Tensor]) -> list[Tensor]:
        """The source's own block, on its own stream."""
        forward = forward_of(self.skeleton, self.batches, index, self.products)
        prefix = self.architecture.block_name(index)
        with self.skeleton.loaded(self.source, prefix) as block, self.clock.timed("forward"):
            return [forward(block, number, hidden) for number, hidden in enumerate(states)]

    def _block(
        self, place: Place, states: list[Tensor], reference: list[Tensor] | None
    ) -> tuple[list[Tensor], list[Tensor] | None, dict[str, Any]]:
        """Prune one block and write it, or take up what was written before a kill; both streams after it."""
        record = self.output.block_record(place.after)
        prefix = self.architecture.block_name(place.before)
        forward = forward_of(self.skeleton, self.batches, place.before, self.products)
        with self.skeleton.loaded(self.source, prefix) as block:
            beside = None if reference is None else Stream(with_source_weights(block), reference)
            if record is not None:
                self._lay_back(place, block, record)
                with self.clock.timed("forward"):
                    states = [forward(block, number, hidden) for number, hidden in enumerate(states)]
                    if beside is not None:
                        beside.states = [forward(beside.block, at, hidden) for at, hidden in enumerate(beside.states)]
                return states, beside.states if beside else None, record
            work = BlockWork(self, place, block)
            stream = Stream(block, states)
            with self.clock.remaining("forward"):
                run_block(stream, self.architecture.groups, forward, work.on_input, work.on_group, beside)
        with self.clock.timed("write"):
            record = work.record()
            self.output.write_tensors(place.after, work.tensors(), record)
        self.context.after_block(place.after)
        return stream.states, beside.states if beside else None, record

    def _lay_back(self, place: Place, block: nn.Module, record: dict[str, Any]) -> None:
        """Give a block of the old size the weights that a finished one has, zero where pieces went."""
        cuts = [Cut(self.kinds[each["reader"]][0], torch.tensor(each["kept"])) for each in record["pruned"]]
        written, after = Checkpoint(self.output.folder), self.architecture.block_name(place.after)
        state = {}
        for name, parameter in block.named_parameters():
            part = written.read(f"{after}.{name}")
            state[name] = laid_back(part, name, cuts, self.architecture.transposed_linears, parameter.shape)
        load_module(block, state, self.context.device, self.context.compute)

    def can_shift(self, columns: int) -> bool:
        """Whether there are tokens enough to move the target of a linear with `columns` inputs, and to judge by."""
        return self.fitted < len(self.batches) and self.windows.tokens >= TOKENS_PER_COLUMN * columns

    def _facts(
        self, removals: list[Removal], blocks: list[dict[str, Any]], shares: list[dict[str, Any]]
    ) -> dict[str, Any]:
        before, after = self.model.counts, self.counts
        facts: dict[str, Any] = {
            "counts": {
                "blocks": [before.blocks, after.blocks],
                "kv_heads": [before.kv_heads, after.kv_heads],
                "mlp_channels": [before.channels, after.channels],
            },
            "parameters": [self.model.parameters(before), self.model.parameters(after)],
            "block_parameters": [self.model.block_parameters(before), self.model.block_parameters(after)],
            "importance": self.stage.importance,
            "tokens": self.windows.tokens,
            **facts_of_products(self.products, self.context.device),
        }
        if shares:
            for key in ("input_share", "residual_share"):
                facts[f"mean_{key}"] = sum(each[key] for each in shares) / len(shares)
        if removals:
            facts["removed_blocks"] = facts_of(removals)
        if blocks:
            facts["pruned"] = [
                {name: each[name] for name in ("block", "reader", "error", "error_without_refit")} for each in blocks
            ]
        return facts
