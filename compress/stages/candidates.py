"""What `sensitivity` and `mixed_precision` have in common: the schemes to choose from, and the text to judge by."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from compress.allocation.units import Unit, units_of
from compress.architecture import Architecture
from compress.calibration.windows import Windows
from compress.checkpoints.formats import FORMATS
from compress.checkpoints.formats.base import Format
from compress.checkpoints.formats.gguf import BLOCK
from compress.quantization.scheme import Scheme
from compress.stages.base import Shapes, Stage
from compress.stages.quantize import (
    Bits,
    GroupSize,
    checked_pattern,
    checked_size,
    groups_that_do_not_divide,
    matches,
    patterns_that_match_nothing,
)


class Candidate(BaseModel):
    """A scheme that linears may get; written as a number of bits where the group size is the stage's."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    bits: Bits
    group_size: GroupSize | None = Field(default=None, description="the stage's where left out")
    symmetric: bool = Field(default=True, description="false, for llama.cpp alone: with a zero point")

    _size = field_validator("group_size")(checked_size)

    @model_validator(mode="before")
    @classmethod
    def _from_bits(cls, data: Any) -> Any:
        return {"bits": data} if isinstance(data, int) else data


class GroupOverride(BaseModel):
    """Another group size, in every candidate, for the modules that match."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    match: str = Field(description="glob, or re: and a regular expression, on module names")
    group_size: GroupSize

    _pattern = field_validator("match")(checked_pattern)
    _size = field_validator("group_size")(checked_size)


DEFAULT_CANDIDATES = (
    Candidate(bits=2),
    Candidate(bits=3),
    Candidate(bits=3, group_size=32),
    Candidate(bits=4),
    Candidate(bits=4, group_size=32),
    Candidate(bits=5),
    Candidate(bits=6),
    Candidate(bits=8),
)
LLAMA_CPP_CANDIDATES = (
    Candidate(bits=4),
    Candidate(bits=4, symmetric=False),
    Candidate(bits=5),
    Candidate(bits=5, symmetric=False),
    Candidate(bits=8),
)
"""Q4_0, Q4_1, Q5_0, Q5_1, Q8_0: fewer bits than a block type has are stored as its own."""
Runtime = Literal["vllm", "transformers", "llama.cpp"]
FORMAT_OF: dict[str, str] = {"vllm": "compressed-tensors", "transformers": "compressed-tensors", "llama.cpp": "gguf"}


class CandidateStage(Stage):
    """Fields of both stages; where a recipe names both, these must be the same."""

    runtime: Runtime = Field(
        default="vllm",
        description="what will serve the result: candidates are those that it runs, and bytes those of its format "
        "(gguf for llama.cpp, compressed-tensors for the others)",
    )
    candidates: tuple[Candidate, ...] = Field(
        default=DEFAULT_CANDIDATES,
        min_length=2,
        description="schemes to choose from: a number of bits, or {bits, group_size, symmetric}; left out for "
        "llama.cpp: Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0",
    )
    group_size: GroupSize = Field(
        default=64, description="input columns that share a scale, or 'channel'; left out for llama.cpp: 32"
    )
    ignore: tuple[str, ...] = Field(default=(), description="modules left as they are: globs, or re: expressions")
    overrides: tuple[GroupOverride, ...] = Field(default=(), description="other group sizes by pattern, for all bits")
    tuning_windows: int = Field(
        default=8, ge=1, description="calibration windows kept apart, on which choices are measured"
    )
    needs_calibration: ClassVar[bool] = True

    _size = field_validator("group_size")(checked_size)

    @model_validator(mode="before")
    @classmethod
    def _of_runtime(cls, data: Any) -> Any:
        """Fill in the runtime's candidates, so that a resolved recipe says what they were."""
        if isinstance(data, dict) and data.get("runtime") == "llama.cpp":
            return {"candidates": LLAMA_CPP_CANDIDATES, "group_size": BLOCK, **data}
        return data

    @property
    def format(self) -> Format:
        """The format whose bytes are counted."""
        return FORMATS[FORMAT_OF[self.runtime]]

    @field_validator("ignore")
    @classmethod
    def _patterns(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(checked_pattern(pattern) for pattern in value)

    @property
    def choice_fields(self) -> dict[str, Any]:
        """What decides the candidates and the tuning split."""
        return {name: getattr(self, name) for name in CandidateStage.model_fields}

    def scheme_for(self, module: str, candidate: Candidate) -> Scheme | None:
        """The scheme of a module in one candidate; None if it is ignored."""
        if any(matches(pattern, module) for pattern in self.ignore):
            return None
        size = candidate.group_size or self.group_size
        for override in self.overrides:
            if matches(override.match, module):
                size = override.group_size
        return Scheme(candidate.bits, candidate.symmetric, None if size == "channel" else size)

    def options(self, module: str) -> list[Scheme]:
        """Schemes of a module, one a candidate and in their order; empty if it is ignored."""
        found = [self.scheme_for(module, candidate) for candidate in self.candidates]
        return [scheme for scheme in found if scheme is not None]

    def units(self, architecture: Architecture, shapes: Shapes) -> list[Unit]:
        """Units of the linears that are not ignored."""
        return units_of(architecture, [module for module in shapes if self.options(module)])

    def check(self, shapes: Shapes, architecture: Architecture) -> list[str]:
        mistakes = patterns_that_match_nothing(self.ignore, [each.match for each in self.overrides], shapes)
        if not any(self.options(module) for module in shapes):
            mistakes.append("ignore: every linear is ignored, so there is nothing to choose")
        for candidate in self.candidates:
            schemes = {module: scheme for module in shapes if (scheme := self.scheme_for(module, candidate))}
            of_blocks = BLOCK if self.format.name == "gguf" else 1
            undivided = groups_that_do_not_divide(schemes, shapes, architecture, of_blocks)
            mistakes += undivided or self._not_held(schemes, shapes, architecture)
        for fused in architecture.fused:
            split = self._split_by_ignore(fused, shapes, architecture)
            if split:
                mistakes.append(split)
        return list(dict.fromkeys(mistakes))

    def _not_held(self, schemes: dict[str, Scheme], shapes: Shapes, architecture: Architecture) -> list[str]:
        """What the runtime's format cannot hold of one candidate, were it everywhere or in a mixture."""
        if self.format.name != "gguf" and any(not scheme.symmetric for scheme in schemes.values()):
            return [f"candidates: {self.format.name} holds no mixtures with zero points; leave out symmetric: false"]
        return [f"runtime {self.runtime}: {said}" for said in self.format.mistakes(schemes, shapes, architecture)]

    def _split_by_ignore(self, fused: tuple[str, ...], shapes: Shapes, architecture: Architecture) -> str | None:
        for index in sorted({block for name in shapes if (block := architecture.block_index(name)) is not None}):
            names = [f"{architecture.block_name(index)}.{part}" for part in fused]
            labels = {str([scheme.label for scheme in self.options(name)]) for name in names}
            if len(labels) > 1:
                return (
                    f"{architecture.block_name(index)}: {', '.join(fused)}: serving runtimes fuse these into one "
                    "matrix, so ignore and overrides must treat them alike. Extend the pattern to all of them."
                )
        return None

    def split(self, windows: Windows) -> tuple[Windows, Windows]:
        """Windows that candidates are computed from, and those that choices are measured on.

        Raises RecipeError where the text gave too few.
        """
        return windows.apart(self.tuning_windows)
