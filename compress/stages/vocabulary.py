"""The matrices with a row for each token: the embedding, and the head where it is one of its own.

All other stages leave them in 16 bits: half the bytes of SmolLM2-135M with 4-bit linears, a third of Llama-3.1-8B's.
Rows are rounded to the nearest value of their grid, the range fitted by squared error; 8 bits cost next to nothing,
fewer are for the gates to judge. A tied head is the embedding: one matrix, which lookups and logits read.
"""

from __future__ import annotations

import time
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator
from torch import Tensor

from compress.architecture import Architecture
from compress.checkpoints.reader import Checkpoint
from compress.quantization.gptq import choose_grid
from compress.quantization.grid import Grid, dequantize, quantize
from compress.quantization.scheme import Scheme, usable_group_sizes
from compress.quantization.super_blocks import K_QUANTS, SUPER
from compress.stages.base import Shapes, Stage, StageContext, StageOutcome
from compress.stages.data_free import kept, module_record
from compress.stages.quantize import (
    NO_ZERO_POINTS,
    OF_K_QUANTS,
    OF_ZERO_POINTS,
    BitsOrPlanned,
    GroupSize,
    as_resolved,
    checked_size,
    left_to_the_plan,
    no_k_quant,
    refuse_beside_k_quant,
)

ROWS = 1 << 14
"""Rounded at once."""
Scales = Literal["minmax", "mse"]
SAID = ("symmetric", "group_size", "zero_points")
"""Fields that a K-quant leaves no choice of."""


class Vocabulary(Stage):
    """Round the embedding and the head to integers. Data-free."""

    kind: Literal["vocabulary"] = "vocabulary"
    bits: BitsOrPlanned = Field(
        default=8, description="bits per weight; 'planned': what a mixed_precision stage with vocabulary: true chose"
    )
    symmetric: bool = Field(default=True, description="one scale per group; otherwise scale and zero point")
    group_size: GroupSize = Field(default=64, description="columns of a row that share a scale, or 'channel'")
    zero_points: Literal["integer", "free"] = Field(default="integer", description=OF_ZERO_POINTS)
    k_quant: bool = Field(default=False, description=OF_K_QUANTS)
    scales: Scales = Field(default="mse", description="how scales are chosen")
    parts: Literal["all", "embedding", "head"] = Field(
        default="all", description="which of the two; a tied head is the embedding, and only 'all' names it"
    )
    on_vocabulary: ClassVar[bool] = True

    _size = field_validator("group_size")(checked_size)

    @model_validator(mode="after")
    def _plan_decides(self) -> Vocabulary:
        if self.follows_plan:
            left_to_the_plan(self, "symmetric", "group_size", "zero_points", "k_quant", "scales", "parts")
        return self

    @model_validator(mode="after")
    def _a_k_quant_decides(self) -> Vocabulary:
        if self.k_quant:
            refuse_beside_k_quant(self, SAID)
        if self.zero_points == "free" and self.symmetric:
            raise ValueError(NO_ZERO_POINTS)
        if self.k_quant and self.bits not in K_QUANTS:
            raise ValueError(no_k_quant(self.bits))
        return self

    @model_serializer(mode="wrap")
    def _written(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return as_resolved(self, write, SAID)

    @property
    def follows_plan(self) -> bool:
        return self.bits == "planned"

    @property
    def scheme(self) -> Scheme:
        """What every matrix gets where no plan says it."""
        assert self.bits != "planned", "schemes are in the plan"
        if self.k_quant:
            return Scheme.of_k_quant(self.bits)
        group = None if self.group_size == "channel" else self.group_size
        return Scheme(self.bits, self.symmetric, group, free_minima=self.zero_points == "free")

    def check(self, shapes: Shapes, architecture: Architecture) -> list[str]:
        if self.follows_plan:
            return []
        found = []
        if self.parts != "all" and len(shapes) == 1:
            found.append(
                f"parts: {self.parts}: the head of this model is tied to its embedding, so they are one matrix; use all"
            )
        for module, (_, columns) in self._of(shapes).items():
            if self.k_quant and not self.scheme.divides(columns):
                found.append(
                    f"{module}: {columns} columns do not divide by the {SUPER} of a K-quant; leave k_quant out"
                )
            elif not self.scheme.divides(columns):
                sizes = usable_group_sizes(columns, self.scheme.width(columns))
                found.append(
                    f"{module}: {columns} columns do not divide into groups of {self.group_size}; use group_size "
                    f"{', '.join(map(str, sizes))} or channel"
                )
        return found

    def schemes(self, shapes: Shapes) -> dict[str, Scheme]:
        return {} if self.follows_plan else dict.fromkeys(self._of(shapes), self.scheme)

    def _schemes_in(self, source: Checkpoint, shapes: Shapes) -> dict[str, Scheme]:
        """Schemes of what it will round: its own, or the plan's."""
        if not self.follows_plan:
            return self.schemes(shapes)
        plan = source.precision_plan
        assert plan is not None, "steps.precision refuses bits: planned where no stage before planned"
        return {name: plan[name] for name in shapes if name in plan}

    def _of(self, shapes: Shapes) -> Shapes:
        """The matrices that it rounds; `shapes` has the embedding first, then a head of its own."""
        names = list(shapes)
        kept = names if self.parts == "all" else names[:1] if self.parts == "embedding" else names[1:]
        return {name: shapes[name] for name in kept}

    def apply(self, context: StageContext) -> StageOutcome:
        source = context.source
        arch = source.architecture
        names = [arch.embedding] if source.tied_head else [arch.embedding, arch.head]
        schemes = self._schemes_in(source, {name: source.matrix_shape(name) for name in names})
        events = [kept(name) for name in names if self.follows_plan and name not in schemes]
        modules, quantised = [], {}
        spent = {"solve": 0.0, "write": 0.0}
        with context.progress.task(self.kind, len(names) + source.block_count) as advance:
            for name, scheme in schemes.items():
                started = time.perf_counter()
                weight = source.dense(name)
                codes, grid, error = rounded_rows(weight, scheme, self.scales, context.stored, context.device)
                quantised[name] = codes, grid
                seconds = time.perf_counter() - started
                spent["solve"] += seconds
                modules.append(module_record(name, None, scheme, tuple(weight.shape), error, seconds))
                advance(name)
            started = time.perf_counter()
            context.output.write_outer(source, quantised=quantised)
            for index in range(source.block_count):
                if context.output.block_record(index) is None:
                    context.output.write_block(source, index, {}, {"modules": [], "events": []})
                    context.after_block(index)
                advance(f"block {index + 1}/{source.block_count}")
            spent["write"] = time.perf_counter() - started
        return StageOutcome(modules, events, spent)


def rounded_rows(
    weight: Tensor, scheme: Scheme, how: Scales, stored: torch.dtype, device: torch.device
) -> tuple[Tensor, Grid, float]:
    """Codes int8, grid (scales in `stored`) and relative error of weight (rows, columns), some rows at a time: a
    vocabulary is long."""
    codes, grids, lost, whole = [], [], 0.0, 0.0
    for start in range(0, weight.shape[0], ROWS):
        part = weight[start : start + ROWS].to(device).float()
        grid = choose_grid(part, None, scheme, stored, how)
        found = quantize(part, grid)
        lost += float((dequantize(found, grid).float() - part).square().sum(dtype=torch.float64))
        whole += float(part.square().sum(dtype=torch.float64))
        codes.append(found.cpu())
        grids.append(grid.cpu())
    return torch.cat(codes), Grid.cat(grids), lost / max(whole, 1e-30)
