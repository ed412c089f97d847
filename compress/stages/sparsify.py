"""Sparsify: zeros among the weights of every linear, block by block behind the blocks already done.

What it is good for has to be said plainly: a zero is stored as any other weight, and no format that is written here
leaves it out, so nothing becomes smaller or faster by it (docs/adr/0019-sparsity.md). It shows what a model can bear,
and prepares weights for runtimes of the user's own.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from compress.architecture import Architecture, InputGroup
from compress.calibration.statistics import InputStatistics
from compress.calibration.walk import Arrival, Stream, forward_of, run_block
from compress.checkpoints.reader import Checkpoint, torch_dtype
from compress.checkpoints.skeleton import Skeleton
from compress.events import Event
from compress.memory.measure import release, trim
from compress.pruning.sparse import Pattern, sparsegpt, upper_factor, wanda
from compress.quantization.scheme import Scheme
from compress.stages.base import Shapes, Stage, StageContext, StageOutcome, rank_deficient, restore
from compress.stages.scheme_checks import matches, patterns_that_match_nothing
from compress.training.clock import Clock


class Sparsify(Stage):
    """Set weights to zero, anywhere or two of every four. Nothing gets smaller or faster: zeros are stored too."""

    kind: Literal["sparsify"] = "sparsify"
    pattern: Pattern = Field(default="unstructured", description="anywhere, or 2:4 (two of four in a row)")
    ratio: float = Field(default=0.5, gt=0, lt=1, description="share of zeros; 2:4 is a half")
    method: Literal["sparsegpt", "wanda"] = Field(
        default="sparsegpt", description="sparsegpt: the rest makes up for what goes; wanda: it stays as it is"
    )
    ridge: float = Field(default=0.01, gt=0, le=1, description="added to the Hessian, fraction of mean(diag H)")
    ignore: tuple[str, ...] = Field(default=(), description="linears left as they are: globs, or re: expressions")
    needs_calibration: ClassVar[bool] = True

    @model_validator(mode="after")
    def _half(self) -> Sparsify:
        if self.pattern == "2:4" and self.ratio != 0.5:
            raise ValueError("ratio: 2:4 makes a half of the weights zero; leave ratio out")
        return self

    @property
    def needs_weights(self) -> bool:
        return True

    def check(self, shapes: Shapes, architecture: Architecture) -> list[str]:
        del architecture
        found = patterns_that_match_nothing(self.ignore, (), shapes)
        if not any(self.takes(name) for name in shapes):
            found.append("ignore: every linear is ignored, so nothing becomes zero")
        uneven = [name for name, (_, columns) in shapes.items() if columns % 4 and self.takes(name)]
        if self.pattern == "2:4" and uneven:
            found.append(
                f"pattern 2:4: the {shapes[uneven[0]][1]} columns of {uneven[0]} do not divide into fours "
                f"({len(uneven)} such linears); ignore them"
            )
        return found

    def takes(self, module: str) -> bool:
        """Whether a linear gets zeros."""
        return not any(matches(pattern, module) for pattern in self.ignore)

    def schemes(self, shapes: Shapes) -> dict[str, Scheme]:
        del shapes
        return {}

    def apply(self, context: StageContext) -> StageOutcome:
        return _Run(self, context).blocks()


class _Run:
    """One application of the stage."""

    def __init__(self, stage: Sparsify, context: StageContext) -> None:
        assert context.windows is not None, "the pipeline gives calibration windows to stages that need them"
        self.stage, self.context, self.source, self.output = stage, context, context.source, context.output
        self.skeleton = Skeleton(self.source.config, context.device, context.compute)
        self.windows = context.windows
        self.batches = self.windows.batches(context.tokens_at_once)
        self.clock = Clock("forward", "hessian", "factorise", "solve", "write")

    @torch.no_grad()
    def blocks(self) -> StageOutcome:
        self.output.write_outer(self.source)
        states = self.skeleton.embed(self.source, self.batches)
        events = rank_deficient(self.windows, self.skeleton) if self.stage.method == "sparsegpt" else []
        sparse: list[dict[str, Any]] = []
        count = self.skeleton.block_count
        with self.context.progress.task("sparsify", count) as advance:
            for index in range(count):
                states, record = self._block(index, states)
                events += restore(record)[1]
                sparse += record["sparse"]
                release()
                advance(f"block {index + 1}/{count}")
        zeros, weights = (sum(each[key] for each in sparse) for key in ("zeros", "weights"))
        facts = {
            "pattern": self.stage.pattern,
            "method": self.stage.method,
            "zeros": zeros,
            "weights": weights,
            "share_of_zeros": zeros / weights if weights else 0.0,
            "gain": "none in size or speed: zeros are stored as other weights are",
            "mean_error": sum(each["error"] for each in sparse) / max(1, len(sparse)),
        }
        return StageOutcome([], events, self.clock.seconds, facts)

    def _block(self, index: int, states: list[Tensor]) -> tuple[list[Tensor], dict[str, Any]]:
        """Sparsify one block and write it, or pass through what was written before a kill; the states after it."""
        record = self.output.block_record(index)
        prefix = self.skeleton.architecture.block_name(index)
        forward = forward_of(self.skeleton, self.batches, index)
        done = Checkpoint(self.output.folder) if record is not None else self.source
        with self.skeleton.loaded(done, prefix) as block:
            if record is not None:
                with self.clock.timed("forward"):
                    return [forward(block, number, hidden) for number, hidden in enumerate(states)], record
            work = _BlockWork(self, prefix, block)
            stream = Stream(block, states)
            with self.clock.remaining("forward"):
                run_block(stream, self.skeleton.architecture.groups, forward, work.on_input, work.on_group)
        record = {"modules": [], "events": [event.to_json() for event in work.events], "sparse": work.records}
        with self.clock.timed("write"):
            self.output.write_block(self.source, index, {}, record, work.written)
        self.context.after_block(index)
        return stream.states, record


class _BlockWork:
    """Statistics and zeros of one block while its forward passes are held."""

    def __init__(self, run: _Run, prefix: str, block: nn.Module) -> None:
        self.run, self.prefix, self.block = run, prefix, block
        self.written: dict[str, Tensor] = {}
        self.records: list[dict[str, Any]] = []
        self.events: list[Event] = []
        self._statistics: InputStatistics | None = None

    def on_input(self, group: InputGroup, number: int, here: Arrival, there: Arrival | None) -> None:
        del there
        if not any(self.run.stage.takes(f"{self.prefix}.{name}") for name in group.linears):
            return
        with self.run.clock.timed("hessian"):
            if self._statistics is None:
                self._statistics = InputStatistics(here.inputs.shape[-1], here.inputs.device)
            self._statistics.add(here.inputs, self.run.batches[number].mask)

    def on_group(self, group: InputGroup) -> None:
        if self._statistics is None:
            return
        statistics, self._statistics = self._statistics, None
        stage, clock = self.run.stage, self.run.clock
        trim()
        with clock.timed("factorise"):
            hessian, _ = statistics.hessian()
            upper = upper_factor(hessian, stage.ridge) if stage.method == "sparsegpt" else None
        for name in group.linears:
            module = f"{self.prefix}.{name}"
            if not stage.takes(module):
                continue
            if upper is None and stage.method == "sparsegpt":
                message = "zeros were chosen by wanda: no factor of the Hessian"
                self.events.append(Event("importance_fallback", module, message))
            with clock.timed("solve"):
                self._put(name, module, hessian, upper)

    def _put(self, name: str, module: str, hessian: Tensor, upper: Tensor | None) -> None:
        stage, transposed = self.run.stage, self.run.skeleton.architecture.transposed_linears
        linear = self.block.get_submodule(name)
        stored = linear.get_parameter("weight").data.float()
        weight = stored.T.contiguous() if transposed else stored
        if upper is None:
            sparse = wanda(weight, hessian.diagonal(), stage.ratio, stage.pattern)
        else:
            sparse = sparsegpt(weight, upper, stage.ratio, stage.pattern)
        single, difference = hessian.float(), sparse - weight
        power = float(((weight @ single) * weight).sum())
        error = float(((difference @ single) * difference).sum()) / power if power > 0 else 0.0
        dtype = torch_dtype(self.run.source.header(f"{module}.weight")[0])
        kept = (sparse.T if transposed else sparse).to(dtype).contiguous()
        self.written[f"{module}.weight"] = kept
        linear.weight = nn.Parameter(kept.to(self.run.context.compute), requires_grad=False)
        self.records.append({"name": module, "zeros": int((kept == 0).sum()), "weights": kept.numel(), "error": error})
