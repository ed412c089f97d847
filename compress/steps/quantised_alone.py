"""The honest question behind pruning: at the bytes that were reached, would quantising alone have been better?

The source is quantised, nothing pruned, with the best uniform scheme that takes no more bytes than the artifact, its
embedding and head rounded as the artifact's are, and measured on the same windows. It is published nowhere, and no gate
sees it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, get_args

from compress.checkpoints.formats import FORMATS
from compress.checkpoints.formats.base import Format
from compress.evaluation.measure import score, summarise, walk_states
from compress.events import Progress
from compress.memory import predict
from compress.memory.measure import PeakSampler
from compress.quantization.scheme import Scheme
from compress.quantization.super_blocks import K_QUANTS
from compress.reports.report import AlternativeRecord
from compress.stages import Gptq
from compress.stages.quantize import Bits
from compress.steps.fold import fold
from compress.steps.judging import Baseline, Evidence
from compress.steps.plan import Plan
from compress.steps.shapes import Shape
from compress.steps.source import OpenedSource
from compress.steps.texts import Texts

GROUP_SIZES = (16, 32, 64, 128, None)


@dataclass(frozen=True)
class Uniform:
    """One scheme for all linears but those whose columns it does not divide, which get one scale a row; and the bytes
    that the whole model then takes."""

    scheme: Scheme
    undivided: tuple[str, ...]
    bytes: int

    @classmethod
    def of(cls, scheme: Scheme, shape: Shape, plan: Plan) -> Uniform | None:
        """None where the format of the comparison cannot hold the scheme."""
        undivided = tuple(name for name, (_, columns) in shape.matrices.items() if not scheme.divides(columns))
        schemes = dict.fromkeys(shape.matrices, scheme) | dict.fromkeys(undivided, _a_scale_a_row(scheme))
        format_ = _format(plan, shape)
        if any(format_.refusal(each, *shape.matrices[name]) for name, each in schemes.items()):
            return None
        rounded = {name: each for name, each in plan.schemes.items() if name in shape.vocabulary}
        size = predict.stored_bytes(shape.tensors, shape.everything, schemes | rounded, plan.stored.itemsize, format_)
        return cls(scheme, undivided, size)

    @property
    def label(self) -> str:
        return self.scheme.label + (" (a scale a row where that does not divide)" if self.undivided else "")


def _format(plan: Plan, shape: Shape) -> Format:
    """Whose bytes are compared: those of packed integers of any width, or gguf's where that is the recipe's format and
    holds the source at all."""
    own, eight = FORMATS[plan.recipe.export.format], Scheme(8, True, None)
    whole = not any(own.refusal(eight, *matrix) for matrix in shape.matrices.values())
    return own if own.name == "gguf" and whole else FORMATS["compressed-tensors"]


def _a_scale_a_row(scheme: Scheme) -> Scheme:
    """What `_like_the_recipes` makes of it by naming the group size alone."""
    return Scheme(scheme.bits, True, None) if scheme.k_quant else replace(scheme, group_size=None)


def best_within(plan: Plan, limit: int) -> Uniform | None:
    """The scheme with the least rounding error to be expected of those that take at most `limit` bytes; None where
    none does."""
    shape = Shape(plan.config)
    schemes = [Scheme(bits, True, group) for bits in get_args(Bits) for group in GROUP_SIZES]
    if _format(plan, shape).name == "gguf":
        schemes += [Scheme(bits, False, 32, free_minima=True) for bits in (4, 5)]
        schemes += map(Scheme.of_k_quant, K_QUANTS)
    found = [Uniform.of(scheme, shape, plan) for scheme in schemes]
    fitting = [each for each in found if each and each.bytes <= limit]
    return min(fitting, key=lambda each: expected_error(each.scheme), default=None)


def expected_error(scheme: Scheme) -> float:
    """Of rounding, relative: a quarter for each bit more, and as the square of a group's range, which for g normal
    numbers is about 2 ln(2 g). A minimum of its own saves a quarter."""
    error = 4.0**-scheme.bits * math.log(2 * (scheme.group_size or 1024))
    return float(error * (1 if scheme.symmetric else 0.75))


def quantised_alone(
    plan: Plan,
    source: OpenedSource,
    baseline: Baseline,
    texts: Texts,
    evidence: Evidence,
    sampler: PeakSampler,
    progress: Progress,
) -> AlternativeRecord:
    """The comparison, which a stage of the recipe asks for (`compares`)."""
    assert texts.calibration is not None, "stages that compare read calibration text"
    limit = int(evidence.compressed.values["weight_bytes"])
    best = best_within(plan, limit)
    if best is None:
        return AlternativeRecord(scheme=None, weight_bytes=None, values={}, limit_bytes=limit, caveats=[])
    stage = _like_the_recipes(plan, best)
    machine = plan.machine
    *_, done = fold(
        (*(stage for stage in plan.recipe.stages if stage.on_vocabulary), stage),
        source.checkpoint,
        source.digest,
        texts.calibration,
        plan.recipe.seed,
        machine,
        plan.stored,
        progress,
        sampler,
        "comparison",
    )
    walked = walk_states(
        done.checkpoint,
        texts.evaluation,
        machine.device,
        machine.compute,
        machine.tokens_at_once,
        progress,
        "measuring what quantising alone gives",
    )
    pairs = (source.checkpoint, baseline.states), (done.checkpoint, walked)
    scores = score(*pairs, texts.evaluation, machine.device, machine.compute, progress)
    values = summarise(plan.recipe.on_text, scores)[1].values
    return AlternativeRecord(
        scheme=best.label, weight_bytes=best.bytes, values=values, limit_bytes=limit, caveats=_caveats(plan)
    )


def _caveats(plan: Plan) -> list[str]:
    """What makes the comparison uneven."""
    said = []
    if any(stage.training for stage in plan.recipe.stages):
        said.append("This artifact was trained towards the source and the other was not.")
    if any(scheme.inputs for scheme in plan.schemes.values()):
        said.append("This artifact rounds inputs too, which costs quality and makes it faster; the other does not.")
    if not FORMATS[plan.recipe.export.format].packs:
        said.append(
            "The other's bytes are those of packed integers, which this artifact's format does not hold; in it both "
            "would take 16 bits a weight."
        )
    return said


def _like_the_recipes(plan: Plan, best: Uniform) -> Gptq:
    """gptq with the settings of the recipe's own, if it has one; else its defaults."""
    own = [stage for stage in plan.recipe.stages if isinstance(stage, Gptq)]
    others = {"bits", "symmetric", "group_size", "inputs", "zero_points", "k_quant", "ignore", "overrides"}
    fields = own[-1].model_dump(exclude=others) if own else {}
    rows = [{"match": name, "group_size": "channel"} for name in best.undivided]
    if best.scheme.k_quant:
        grid: dict[str, Any] = {"k_quant": True}
    else:
        free = "free" if best.scheme.free_minima else "integer"
        group = best.scheme.group_size or "channel"
        grid = {"group_size": group, "symmetric": best.scheme.symmetric, "zero_points": free}
    return Gptq(**{**fields, "bits": best.scheme.bits, **grid, "overrides": rows})
