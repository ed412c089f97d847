"""Channel scaling before quantising: SmoothQuant for W8A8, AWQ for weights alone. Leaves a plain checkpoint.

A linear y = W x does not change when a column of W is multiplied by s_j and x_j divided by it, and where x comes from a
norm or from another linear's rows, that division is folded into it (`checkpoints.couplings`), so that nothing runs
more. What changes is how much rounding costs:

    SmoothQuant   s_j = max|x_j|^alpha / max|W_j|^(1 - alpha)    moves outliers of inputs into weights, so that rounding
                                                                 both to int8 loses least (arXiv 2211.10438)
    AWQ           s_j = mean|x_j|^alpha                          makes columns that see large inputs large, so that they
                                                                 lose less when weights are rounded (arXiv 2306.00978)

alpha is chosen for each place by the squared error of its outputs on a sample of calibration tokens, with weights, and
for SmoothQuant inputs, rounded as the stage after will; s = 1 is a candidate, so no place gets worse by that measure.
The walk sees source activations only: scaling changes no function.

Example: inputs of two channels reach 100 and 1, their columns of W 1 and 1. alpha 0.5: s = [10, 1]; inputs reach 10 and
1, columns 10 and 1: the int8 step of a token falls to a tenth.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from compress.architecture import Architecture, Coupling, InputGroup, dimensions_of
from compress.calibration.walk import Arrival, Stream, forward_of, run_block
from compress.checkpoints.couplings import to_channels, to_columns, written
from compress.checkpoints.skeleton import Batch, Skeleton
from compress.memory.measure import release
from compress.quantization.grid import dequantize, quantize
from compress.quantization.grid_search import minmax_grid
from compress.quantization.inputs import rounded_inputs
from compress.quantization.scheme import Scheme
from compress.stages.base import Shapes, Stage, StageContext, StageOutcome
from compress.stages.quantize import GroupSize, checked_size
from compress.training.clock import Clock

SAMPLE = 1024
"""Tokens of each place that candidates are compared on."""
FURTHEST = 1e4
"""Largest factor, and one over the smallest: what keeps float16 weights inside their range."""


class ScalingStage(Stage):
    """Base of the two: which places are scaled, and the walk."""

    steps: int = Field(default=20, ge=1, le=100, description="values of alpha that are tried for each place")
    needs_calibration: ClassVar[bool] = True

    @property
    def needs_weights(self) -> bool:
        return True

    def check(self, shapes: Shapes, architecture: Architecture) -> list[str]:
        if architecture.couplings:
            return []
        return [f"{architecture.model_type} has no place known here where a channel's factor can be folded"]

    def schemes(self, shapes: Shapes) -> dict[str, Scheme]:
        return {}

    def factors(self, seen: Seen, weights: list[Tensor], alpha: float) -> Tensor:
        """s (columns,) for one alpha, before normalising."""
        raise NotImplementedError

    def rounded(self, inputs: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs (tokens, columns) and weight (rows, columns) as they will be once quantised."""
        raise NotImplementedError

    def apply(self, context: StageContext) -> StageOutcome:
        return _Run(self, context).blocks()


class SmoothQuant(ScalingStage):
    """Scale channels so that W8A8 loses less: outliers of inputs move into weights. Put it before a stage with inputs:
    int8."""

    kind: Literal["smoothquant"] = "smoothquant"

    def factors(self, seen: Seen, weights: list[Tensor], alpha: float) -> Tensor:
        columns = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)
        return seen.largest.clamp_min(1e-5) ** alpha / columns.clamp_min(1e-5) ** (1 - alpha)

    def rounded(self, inputs: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return rounded_inputs(inputs), _rounded(weight, Scheme(8, True, None))


class Awq(ScalingStage):
    """Scale channels so that rounding weights loses less where inputs are large. Put it before a weight-only stage."""

    kind: Literal["awq"] = "awq"
    bits: Literal[2, 3, 4, 5, 6, 8] = Field(default=4, description="of the stage after it")
    group_size: GroupSize = Field(default=64, description="of the stage after it")

    _size = field_validator("group_size")(checked_size)

    def factors(self, seen: Seen, weights: list[Tensor], alpha: float) -> Tensor:
        return seen.mean.clamp_min(1e-5) ** alpha

    def rounded(self, inputs: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        size = None if self.group_size == "channel" else self.group_size
        divides = size is None or weight.shape[1] % size == 0
        return inputs, _rounded(weight, Scheme(self.bits, True, size if divides else None))


def _rounded(weight: Tensor, scheme: Scheme) -> Tensor:
    grid = minmax_grid(weight, scheme, torch.float32)
    return dequantize(quantize(weight, grid), grid)


@dataclass
class Seen:
    """Of the inputs of one place: the largest and the mean magnitude of each column, and a sample of tokens."""

    largest: Tensor
    total: Tensor
    tokens: int
    sample: list[Tensor]

    @property
    def mean(self) -> Tensor:
        return self.total / max(1, self.tokens)

    @classmethod
    def nothing(cls, columns: int, device: torch.device) -> Seen:
        return cls(torch.zeros(columns, device=device), torch.zeros(columns, device=device), 0, [])

    def add(self, inputs: Tensor, mask: Tensor | None, share: int) -> None:
        """Tokens (windows, tokens, columns), padding left out; `share` of them go into the sample."""
        flat = inputs.flatten(0, -2) if mask is None else inputs[mask.bool().to(inputs.device)]
        magnitudes = flat.float().abs()
        self.largest = torch.maximum(self.largest, magnitudes.amax(0))
        self.total += magnitudes.sum(0)
        self.tokens += len(flat)
        step = max(1, len(flat) // share)
        self.sample.append(flat[::step][:share].float())


class _Run:
    """One application of the stage."""

    def __init__(self, stage: ScalingStage, context: StageContext) -> None:
        assert context.windows is not None, "the pipeline gives calibration windows to stages that need them"
        self.stage, self.context = stage, context
        self.source, self.output = context.source, context.output
        self.skeleton = Skeleton(self.source.config, context.device, context.compute)
        self.batches: list[Batch] = context.windows.batches(context.tokens_at_once)
        self.dimensions = dimensions_of(self.skeleton.config)
        self.clock = Clock("forward", "search", "write")

    @torch.no_grad()
    def blocks(self) -> StageOutcome:
        places: list[dict[str, Any]] = []
        self.output.write_outer(self.source)
        with self.clock.timed("forward"):
            states = self.skeleton.embed(self.source, self.batches)
        count = self.skeleton.block_count
        with self.context.progress.task(str(getattr(self.stage, "kind", "")), count) as advance:
            for index in range(count):
                record = self.output.block_record(index)
                states, found = self._block(index, states, known=record is not None)
                if record is None:
                    record = found
                    self.context.after_block(index)
                places += record["places"]
                release()
                advance(f"block {index + 1}/{count}")
        return StageOutcome([], [], self.clock.seconds, {"places": places})

    def _block(self, index: int, states: list[Tensor], known: bool) -> tuple[list[Tensor], dict[str, Any]]:
        arch = self.skeleton.architecture
        forward = forward_of(self.skeleton, self.batches, index)
        chosen: dict[Coupling, Tensor] = {}
        places: list[dict[str, Any]] = []
        with self.skeleton.loaded(self.source, arch.block_name(index)) as block:
            if known:
                with self.clock.timed("forward"):
                    return [forward(block, number, hidden) for number, hidden in enumerate(states)], {}
            stream = Stream(block, states)
            seen: dict[str, Seen] = {}
            coupling_of = {group.name: _coupling(arch, group) for group in arch.groups}

            def on_input(group: InputGroup, number: int, here: Arrival, there: Arrival | None) -> None:
                if coupling_of[group.name] is not None:
                    columns = here.inputs.shape[-1]
                    place = seen.setdefault(group.name, Seen.nothing(columns, here.inputs.device))
                    place.add(here.inputs, self.batches[number].mask, max(1, SAMPLE // len(self.batches)))

            def on_group(group: InputGroup) -> None:
                coupling = coupling_of[group.name]
                if coupling is not None:
                    with self.clock.timed("search"):
                        factors, record = self._search(block, coupling, seen.pop(group.name))
                    chosen[coupling] = factors
                    places.append({"block": index, "writer": coupling.writer, **record})

            with self.clock.remaining("forward"):
                run_block(stream, arch.groups, forward, on_input, on_group)
        record = {"modules": [], "events": [], "places": places}
        with self.clock.timed("write"):
            self.output.write_tensors(index, self._scaled(index, chosen), record)
        return stream.states, record

    def _search(self, block: nn.Module, coupling: Coupling, seen: Seen) -> tuple[Tensor, dict[str, Any]]:
        """Factors of the writer's channels, 1 / s, and what they are expected to change."""
        weights = [block.get_submodule(name).get_parameter("weight").data.float() for name in coupling.readers]
        sample = torch.cat(seen.sample)
        outputs = [sample @ weight.T for weight in weights]
        plain = self._error(sample, weights, outputs, torch.ones_like(seen.largest))
        best, best_error, best_alpha = torch.ones_like(seen.largest), plain, None
        for step in range(self.stage.steps + 1):
            alpha = step / self.stage.steps
            columns = self.stage.factors(seen, weights, alpha)
            channels = to_channels(coupling, columns, self.dimensions)
            channels = channels / (channels.amax() * channels.amin()).sqrt()
            channels = channels.clamp(1 / FURTHEST, FURTHEST)
            scale = to_columns(coupling, channels, self.dimensions)
            error = self._error(sample, weights, outputs, scale)
            if error < best_error:
                best, best_error, best_alpha = channels, error, alpha
        if best_alpha is None:
            best = torch.ones_like(to_channels(coupling, best, self.dimensions))
        return 1 / best, {"alpha": best_alpha, "error_ratio": best_error / plain if plain > 0 else 1.0}

    def _error(self, sample: Tensor, weights: list[Tensor], outputs: list[Tensor], scale: Tensor) -> float:
        """Squared error of outputs with columns times `scale`, everything rounded; a number only to compare with."""
        total = 0.0
        for weight, output in zip(weights, outputs, strict=True):
            inputs, rounded = self.stage.rounded(sample / scale, weight * scale)
            total += float((inputs @ rounded.T - output).square().sum(dtype=torch.float64))
        return total

    def _scaled(self, index: int, chosen: dict[Coupling, Tensor]) -> dict[str, Tensor]:
        """Every tensor of the block, with factors folded in; changed ones in float32."""
        arch = self.skeleton.architecture
        prefix = arch.block_name(index) + "."
        tensors = {}
        for inside, stored in self.source.dense_state(prefix.rstrip(".")).items():
            name, value = prefix + inside, stored
            module, _, leaf = inside.rpartition(".")
            for coupling, factors in chosen.items():
                on_host = factors.cpu()
                if module == coupling.writer:
                    value = written(value.float(), coupling, on_host, arch.norm_offset)
                elif module in coupling.readers and leaf == "weight":
                    value = value.float() / to_columns(coupling, on_host, self.dimensions)
            tensors[name] = value.contiguous() if value is not stored else stored
        return tensors


def _coupling(architecture: Architecture, group: InputGroup) -> Coupling | None:
    """The place where factors of a group's inputs can be folded, if all its linears are readers there."""
    return next((each for each in architecture.couplings if set(each.readers) == set(group.linears)), None)
