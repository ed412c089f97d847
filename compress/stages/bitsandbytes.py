"""bitsandbytes' own quantisers as stages: NF4 and FP4 (QLoRA's, data-free), and LLM.int8.

The codes are those of the library, and the artifact (`export.format: bitsandbytes`) holds them in the form that the
library saves. What is measured is what the library computes: for LLM.int8 with integer inputs, and with columns that
reach the threshold in 16 bits. Sources: Dettmers et al., arXiv 2305.14314 (NF4) and 2208.07339 (LLM.int8).
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator
from torch import Tensor

from compress.architecture import Architecture
from compress.checkpoints.formats.bitsandbytes import RANGE, nested_scales, require
from compress.checkpoints.formats.bitsandbytes import unpack as unpacked
from compress.quantization.gptq import relative_error
from compress.quantization.grid import Grid, dequantize
from compress.quantization.scheme import Scheme
from compress.stages.base import Shapes, Stage, StageContext, StageOutcome
from compress.stages.data_free import quantise_each
from compress.stages.scheme_checks import (
    NOTHING_LEFT,
    checked_pattern,
    groups_that_do_not_divide,
    matches,
    patterns_that_match_nothing,
)


class BitsAndBytesStage(Stage):
    """Quantise with bitsandbytes: NF4, FP4 or LLM.int8. Data-free."""

    kind: Literal["bitsandbytes"] = "bitsandbytes"
    type: Literal["nf4", "fp4", "int8"] = Field(default="nf4", description="4-bit grid, or LLM.int8")
    double_quant: bool = Field(default=True, description="nf4 and fp4: round the scales too, to 8 bits")
    group_size: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096] = Field(
        default=64, description="nf4 and fp4: weights that share a scale; transformers builds its linears for 64"
    )
    threshold: float = Field(default=6.0, gt=0, description="int8: inputs from this size on stay in 16 bits")
    ignore: tuple[str, ...] = Field(default=(), description="modules left as they are: globs, or re: expressions")

    @field_validator("ignore")
    @classmethod
    def _patterns(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(checked_pattern(pattern) for pattern in value)

    @property
    def needs_weights(self) -> bool:
        return True

    @property
    def scheme(self) -> Scheme:
        """The one scheme of the stage."""
        if self.type == "int8":
            return Scheme(8, True, None, inputs=8, outliers=self.threshold)
        return Scheme(4, True, self.group_size, grid=self.type, nested=self.double_quant)

    def check(self, shapes: Shapes, architecture: Architecture) -> list[str]:
        require()
        return [
            *patterns_that_match_nothing(self.ignore, [], shapes),
            *([] if self.schemes(shapes) or not shapes else [NOTHING_LEFT]),
            *groups_that_do_not_divide(self.schemes(shapes), shapes, architecture, multiples_of=0),
        ]

    def schemes(self, shapes: Shapes) -> dict[str, Scheme]:
        found = {module: self.scheme_of(module) for module in shapes}
        return {module: scheme for module, scheme in found.items() if scheme is not None}

    def apply(self, context: StageContext) -> StageOutcome:
        return quantise_each(context, self.kind, self.scheme_of, _quantised)

    def scheme_of(self, module: str) -> Scheme | None:
        """The stage's scheme, or None for a linear that is ignored."""
        return None if any(matches(pattern, module) for pattern in self.ignore) else self.scheme


def _quantised(weight: Tensor, scheme: Scheme) -> tuple[Tensor, Grid, float]:
    codes, grid = quantise(weight, scheme)
    return codes, grid, relative_error(weight, dequantize(codes, grid).to(weight.device), None)


def quantise(weight: Tensor, scheme: Scheme) -> tuple[Tensor, Grid]:
    """Codes int8 and grid of weight (rows, columns) float32, by bitsandbytes' own functions, on the host."""
    functional = require()
    rows, columns = weight.shape
    if scheme.grid == "int":
        codes, absmax, _ = functional.int8_vectorwise_quant(weight.half())
        return codes.cpu(), Grid(scheme, (absmax.float() / RANGE).view(rows, 1).cpu(), None)
    packed, state = functional.quantize_4bit(
        weight.contiguous(), blocksize=scheme.group_size, quant_type=scheme.grid, compress_statistics=False
    )
    absmax = state.absmax.float()
    nested = nested_scales(absmax) if scheme.nested else None
    scale = nested.scales() if nested else absmax.cpu()
    return unpacked(packed.cpu(), rows, columns), Grid(scheme, scale.view(rows, -1), None, nested)
