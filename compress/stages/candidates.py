"""What `sensitivity` and `mixed_precision` have in common: the schemes to choose from, and the text to judge by."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from compress.allocation.units import Unit, units_of
from compress.architecture import Architecture
from compress.calibration.products import Products
from compress.calibration.windows import Windows
from compress.checkpoints.formats import FORMATS
from compress.checkpoints.formats.base import Format
from compress.checkpoints.formats.gguf import BLOCK
from compress.quantization.scheme import Option, Scheme
from compress.quantization.super_blocks import K_QUANTS
from compress.stages.base import Shapes, Stage
from compress.stages.quantize import (
    GroupSize,
    as_resolved,
    checked_size,
    no_k_quant,
    refuse_beside_k_quant,
)
from compress.stages.scheme_checks import (
    checked_pattern,
    groups_that_do_not_divide,
    integer_inputs_that_do_not_fit,
    matches,
    patterns_that_match_nothing,
    super_blocks_that_do_not_divide,
)

SAID = ("symmetric", "group_size", "inputs")
"""Fields of a candidate that a K-quant leaves no choice of."""


class Candidate(BaseModel):
    """A scheme that linears may get; written as a number of bits where the group size is the stage's."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    bits: Literal[2, 3, 4, 5, 6, 8, 16] = Field(description="16: left as it is")
    group_size: GroupSize | None = Field(default=None, description="the stage's where left out")
    symmetric: bool = Field(default=True, description="false, for llama.cpp alone: with a minimum (Q4_1, Q5_1)")
    inputs: Literal["int8", "none"] = Field(default="none", description="int8: W8A8, with bits: 8 and a scale a row")
    k_quant: bool = Field(
        default=False,
        description="for llama.cpp alone: Q2_K to Q6_K by bits, which say the group size; where an override gives a "
        "group size, symmetric codes in such groups instead",
    )

    _size = field_validator("group_size")(checked_size)

    @model_validator(mode="before")
    @classmethod
    def _from_bits(cls, data: Any) -> Any:
        found = {"bits": data} if isinstance(data, int) else data
        if isinstance(found, dict) and found.get("inputs") == "int8":
            return {"group_size": "channel", **found}
        return found

    @model_validator(mode="after")
    def _nothing_beside_16(self) -> Candidate:
        others = self.group_size or not self.symmetric or self.inputs != "none"
        if self.bits == 16 and (others or self.k_quant):
            raise ValueError(
                "bits: 16 leaves a linear as it is; group_size, symmetric, inputs and k_quant say nothing of it"
            )
        if self.k_quant:
            refuse_beside_k_quant(self, SAID)
        if self.k_quant and self.bits not in K_QUANTS:
            raise ValueError(no_k_quant(self.bits))
        return self

    @model_serializer(mode="wrap")
    def _written(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return as_resolved(self, write, SAID)


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
        "(gguf for llama.cpp, compressed-tensors for the others). vllm fuses q, k, v and gate, up, so they share a "
        "scheme there; for the others each has its own, and vllm then does not serve the files",
    )
    candidates: tuple[Candidate, ...] = Field(
        default=DEFAULT_CANDIDATES,
        min_length=2,
        description="schemes to choose from: a number of bits (16: as it is), or {bits, group_size, symmetric, "
        "inputs, k_quant}; left out for llama.cpp: Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0",
    )
    group_size: GroupSize = Field(
        default=64, description="input columns that share a scale, or 'channel'; left out for llama.cpp: 32"
    )
    vocabulary: bool = Field(
        default=False,
        description="choose for the embedding and the head too, where the runtime reads them quantised (any in GGUF, "
        "an untied head in compressed-tensors); 16 bits are always among their candidates. A `vocabulary` stage with "
        "bits: planned follows",
    )
    ignore: tuple[str, ...] = Field(default=(), description="modules left as they are: globs, or re: expressions")
    overrides: tuple[GroupOverride, ...] = Field(
        default=(), description="other group sizes by pattern, for all candidates; K-quants give way to them"
    )
    tuning_windows: int = Field(
        default=8, ge=1, description="calibration windows kept apart, on which choices are measured"
    )
    products: Products = Field(
        default="float32",
        description="what linears and the head multiply in while `sensitivity` walks the calibration text, on a CPU: "
        "bfloat16 is faster on processors with units for it (AMX, AVX512-BF16: auto takes it there), and sums over "
        "inputs, H among them, are of 8-bit integers then where the processor multiplies those exactly (VNNI, AMX), "
        "in float32 elsewhere. Solving and measuring stay in float32",
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
    def fuses(self) -> bool:
        """Whether the runtime makes one matrix of q, k, v and of gate, up, which then share a scheme."""
        return self.runtime == "vllm"

    @property
    def format(self) -> Format:
        """The format whose bytes are counted."""
        return FORMATS[FORMAT_OF[self.runtime]]

    @field_validator("candidates")
    @classmethod
    def _once(cls, value: tuple[Candidate, ...]) -> tuple[Candidate, ...]:
        if len(set(value)) < len(value):
            raise ValueError("a candidate is named twice")
        return value

    @field_validator("ignore")
    @classmethod
    def _patterns(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(checked_pattern(pattern) for pattern in value)

    @property
    def choice_fields(self) -> dict[str, Any]:
        """What decides the candidates and the tuning split."""
        return {name: getattr(self, name) for name in CandidateStage.model_fields}

    @property
    def beside_linears(self) -> bool:
        return self.vocabulary

    def scheme_for(self, module: str, candidate: Candidate) -> Option:
        """The scheme of a module in one candidate."""
        if candidate.bits == 16:
            return None
        size = candidate.group_size or self.group_size
        for override in self.overrides:
            if matches(override.match, module) and candidate.inputs == "none":
                size = override.group_size
                if candidate.k_quant:
                    return Scheme(candidate.bits, True, None if size == "channel" else size)
        if candidate.k_quant:
            return Scheme.of_k_quant(candidate.bits)
        inputs = 8 if candidate.inputs == "int8" else None
        # What llama.cpp takes off is a float16, so it may be any.
        free = not candidate.symmetric and self.runtime == "llama.cpp"
        return Scheme(
            candidate.bits, candidate.symmetric, None if size == "channel" else size, inputs, free_minima=free
        )

    def options(self, module: str) -> list[Option]:
        """What a linear may get, one a candidate and in their order; empty if it is ignored."""
        if any(matches(pattern, module) for pattern in self.ignore):
            return []
        return [self.scheme_for(module, candidate) for candidate in self.candidates]

    def options_of_vocabulary(self, module: str) -> list[Option]:
        """What the embedding or the head may get: candidates of weights alone, then 16 bits."""
        found = [option for option in self.options(module) if option is not None and not option.inputs]
        return [*dict.fromkeys(found), None] if found else []

    def options_in(self, unit: Unit) -> list[list[Option]]:
        """What a unit may get: for each option, what its modules get, in their order."""
        options = self.options if unit.block is not None else self.options_of_vocabulary
        return [list(each) for each in zip(*(options(module) for module in unit.modules), strict=True)]

    def units(self, architecture: Architecture, shapes: Shapes) -> list[Unit]:
        """Units of the linears that are not ignored; then the embedding and the head where they are chosen for."""
        linears = [module for module in shapes if architecture.block_index(module) is not None]
        found = units_of(architecture, [module for module in linears if self.options(module)], self.fuses)
        if self.vocabulary:
            held = self._held_vocabulary(shapes, architecture)
            outside = [module for module in held if self.options_of_vocabulary(module)]
            found += [Unit(None, leaf := module.rsplit(".", 1)[-1], (module,), leaf) for module in outside]
        return found

    def _held_vocabulary(self, shapes: Shapes, architecture: Architecture) -> list[str]:
        """The embedding and the head, as far as the runtime reads them quantised."""
        outside = [module for module in shapes if architecture.block_index(module) is None]
        if self.format.vocabulary == "any":
            return outside
        return [module for module in outside if module == architecture.head] if self.format.vocabulary == "head" else []

    def option_bytes(self, option: Option, shape: tuple[int, int], dtype_bytes: int) -> int:
        """Bytes of a matrix (rows, columns) in the runtime's format."""
        if option is None:
            return self.format.other_bytes(shape, dtype_bytes)
        return self.format.stored_bytes(option, *shape, dtype_bytes)

    def check(self, shapes: Shapes, architecture: Architecture) -> list[str]:
        mistakes = patterns_that_match_nothing(self.ignore, [each.match for each in self.overrides], shapes)
        linears = {module: shape for module, shape in shapes.items() if architecture.block_index(module) is not None}
        if not any(self.options(module) for module in linears):
            mistakes.append("ignore: every linear is ignored, so there is nothing to choose")
        outside = {module: shapes[module] for module in self._held_vocabulary(shapes, architecture)}
        if self.vocabulary and not outside:
            mistakes.append(
                f"vocabulary: {self.format.name} holds {architecture.embedding} in 16 bits only, and the head is tied "
                "to it; leave vocabulary out, or choose for llama.cpp"
                if self.format.vocabulary == "head"
                else f"vocabulary: {self.format.name} holds neither embedding nor head quantised; leave it out"
            )
        if outside and self.vocabulary and not any(self.options_of_vocabulary(module) for module in outside):
            mistakes.append(
                f"vocabulary: nothing to choose for {' and '.join(outside)}: ignore names them, or no candidate is of "
                "weights alone"
            )
        if not self.vocabulary:
            outside = {}
        chosen = [module for module in (linears | outside) if self.options(module)]
        for candidate in self.candidates:
            of = linears if candidate.inputs == "int8" else linears | outside
            found = {module: self.scheme_for(module, candidate) for module in chosen if module in of}
            schemes = {module: scheme for module, scheme in found.items() if scheme is not None}
            of_blocks = BLOCK if self.format.name == "gguf" else 1
            undivided = groups_that_do_not_divide(schemes, shapes, architecture, of_blocks)
            undivided += super_blocks_that_do_not_divide(schemes, shapes)
            mistakes += undivided or integer_inputs_that_do_not_fit(schemes)
            mistakes += [] if undivided else self._not_held(schemes, shapes, architecture)
        for fused in architecture.fused if self.fuses else ():
            split = self._split_by_ignore(fused, shapes, architecture)
            if split:
                mistakes.append(split)
        return list(dict.fromkeys(mistakes))

    def _not_held(self, schemes: dict[str, Scheme], shapes: Shapes, architecture: Architecture) -> list[str]:
        """What the runtime's format cannot hold of one candidate, were it everywhere or in a mixture."""
        if self.format.name != "gguf" and any(scheme.k_quant for scheme in schemes.values()):
            return ["candidates: K-quants are llama.cpp's; leave out k_quant: true, or choose for runtime: llama.cpp"]
        if self.format.name != "gguf" and any(not scheme.symmetric for scheme in schemes.values()):
            return [f"candidates: {self.format.name} holds no mixtures with zero points; leave out symmetric: false"]
        return [f"runtime {self.runtime}: {said}" for said in self.format.mistakes(schemes, shapes, architecture)]

    def _split_by_ignore(self, fused: tuple[str, ...], shapes: Shapes, architecture: Architecture) -> str | None:
        for index in sorted({block for name in shapes if (block := architecture.block_index(name)) is not None}):
            names = [f"{architecture.block_name(index)}.{part}" for part in fused]
            labels = {str([scheme and scheme.label for scheme in self.options(name)]) for name in names}
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
