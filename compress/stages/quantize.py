"""What all weight-quantising stages share: which modules get which scheme. `scheme_checks` has the checks on that."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from compress.architecture import Architecture
from compress.checkpoints.reader import Checkpoint
from compress.events import Event
from compress.quantization.scheme import Scheme
from compress.quantization.super_blocks import K_QUANTS
from compress.stages.base import Shapes, Stage
from compress.stages.data_free import kept
from compress.stages.scheme_checks import (
    NOTHING_LEFT,
    checked_pattern,
    groups_that_do_not_divide,
    integer_inputs_that_do_not_fit,
    matches,
    patterns_that_match_nothing,
    super_blocks_that_do_not_divide,
)

Bits = Literal[2, 3, 4, 5, 6, 8]
BitsOrPlanned = Literal[2, 3, 4, 5, 6, 8, "planned"]
GroupSize = int | Literal["channel"]
SAID_BY_K_QUANTS = ("symmetric", "group_size", "inputs", "zero_points")
"""Fields that a K-quant leaves no choice of."""
OF_ZERO_POINTS = (
    "with symmetric: false; free, for format gguf alone: the least value of a group is any float16, no multiple of its "
    "scale: less error in the same bytes (Q4_1, Q5_1)"
)
OF_K_QUANTS = (
    "a K-quant of llama.cpp, for format gguf: Q2_K to Q6_K by bits, which say group size and symmetry; columns divide "
    "by 256"
)
"""What fields of the two names say, here and in `vocabulary`."""


class Override(BaseModel):
    """Another scheme for the modules that match; fields left out keep the stage's value. One that says what a K-quant
    leaves no choice of, or 8 bits, leaves K-quants."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    match: str = Field(description="glob, or re: and a regular expression, on module names")
    bits: Bits | None = None
    symmetric: bool | None = None
    group_size: GroupSize | None = None
    inputs: Literal["int8", "none"] | None = None
    zero_points: Literal["integer", "free"] | None = Field(default=None, description="free: asymmetric too")
    k_quant: bool | None = None

    _pattern = field_validator("match")(checked_pattern)
    _size = field_validator("group_size")(lambda value: checked_size(value))

    @property
    def leaves_k_quants(self) -> bool:
        """Whether it says something that no K-quant has."""
        return (self.bits or 4) not in K_QUANTS or any(getattr(self, name) is not None for name in SAID_BY_K_QUANTS)


def checked_size(value: GroupSize | None) -> GroupSize | None:
    if isinstance(value, int) and (value < 2 or isinstance(value, bool)):
        raise ValueError("group_size is a number of columns (32, 64, 128 are served everywhere) or 'channel'")
    return value


def refuse_beside_k_quant(model: BaseModel, said: tuple[str, ...]) -> None:
    """Raises ValueError where a model with `k_quant: true` was given a field that it leaves no choice of, be it the
    field's default: that is not what the type has."""
    if {*said} & model.model_fields_set:
        raise ValueError(says_no_more(said))


def says_no_more(fields: tuple[str, ...]) -> str:
    """That a K-quant leaves no choice of them."""
    return f"k_quant: true says {', '.join(fields[:-1])} and {fields[-1]} by its bits; leave them out"


def as_resolved(model: BaseModel, write: SerializerFunctionWrapHandler, said: tuple[str, ...]) -> dict[str, Any]:
    """A model's fields as a resolved recipe has them: without `said` beside `k_quant: true`, whose defaults are not
    what ran."""
    data: dict[str, Any] = write(model)
    return {name: value for name, value in data.items() if not (data.get("k_quant") and name in said)}


def no_k_quant(bits: object) -> str:
    """That there is none of so many bits."""
    return f"no K-quant has {bits} bits; they have {', '.join(map(str, K_QUANTS))}. Leave k_quant out, or give it false"


NO_ZERO_POINTS = "zero_points say nothing of symmetric codes; give symmetric: false"


class QuantizeStage(Stage):
    """Fields of every weight-only stage."""

    bits: BitsOrPlanned = Field(
        default=4, description="bits per weight; 'planned': schemes are those a mixed_precision stage before chose"
    )
    symmetric: bool = Field(default=True, description="one scale per group; otherwise scale and zero point")
    group_size: GroupSize = Field(default=64, description="input columns that share a scale, or 'channel'")
    inputs: Literal["int8", "none"] = Field(
        default="none",
        description="int8: linears round their inputs as they run, a scale a token, and multiply integers (W8A8); goes "
        "with bits: 8, symmetric, group_size: channel",
    )
    zero_points: Literal["integer", "free"] = Field(default="integer", description=OF_ZERO_POINTS)
    k_quant: bool = Field(
        default=False,
        description=f"{OF_K_QUANTS}; beside overrides that leave K-quants, what is said of both is theirs",
    )
    ignore: tuple[str, ...] = Field(default=(), description="modules left as they are: globs, or re: expressions")
    overrides: tuple[Override, ...] = Field(default=(), description="other schemes by pattern; the last match wins")

    _size = field_validator("group_size")(checked_size)

    @field_validator("ignore")
    @classmethod
    def _patterns(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(checked_pattern(pattern) for pattern in value)

    @model_validator(mode="after")
    def _plan_decides(self) -> QuantizeStage:
        if self.follows_plan:
            left_to_the_plan(self, "symmetric", "group_size", "inputs", "zero_points", "k_quant", "ignore", "overrides")
        return self

    @model_validator(mode="after")
    def _a_k_quant_decides(self) -> QuantizeStage:
        if self.k_quant and not self._some_leave_k_quants:
            refuse_beside_k_quant(self, SAID_BY_K_QUANTS)
        for override in self.overrides:
            bits = override.bits or 4
            if override.k_quant and any(getattr(override, name) is not None for name in SAID_BY_K_QUANTS):
                raise ValueError(f"overrides, {override.match!r}: {says_no_more(SAID_BY_K_QUANTS)}")
            if override.k_quant and bits not in K_QUANTS:
                raise ValueError(f"overrides, {override.match!r}: {no_k_quant(bits)}")
        if self.k_quant and self.bits not in K_QUANTS:
            raise ValueError(no_k_quant(self.bits))
        return self

    @model_validator(mode="after")
    def _zero_points_of_something(self) -> QuantizeStage:
        for override in self.overrides:
            if override.zero_points == "free" and override.symmetric:
                raise ValueError(f"overrides, {override.match!r}: {NO_ZERO_POINTS}")
        asymmetric = not self.symmetric or any(each.symmetric is False for each in self.overrides)
        if self.zero_points == "free" and not asymmetric:
            raise ValueError(NO_ZERO_POINTS)
        return self

    @property
    def _some_leave_k_quants(self) -> bool:
        """Whether overrides take linears out of K-quants: what the stage says of grids is then theirs."""
        return any(not each.k_quant and (each.k_quant is False or each.leaves_k_quants) for each in self.overrides)

    @model_serializer(mode="wrap")
    def _written(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return as_resolved(self, write, () if self._some_leave_k_quants else SAID_BY_K_QUANTS)

    @property
    def follows_plan(self) -> bool:
        """Whether the schemes come from a precision plan."""
        return self.bits == "planned"

    def following(self, plan: dict[str, Scheme], modules: Iterable[str]) -> Self:
        """The stage with a plan's schemes for `modules` written out; those that are not in it are ignored."""
        names = list(modules)
        overrides = tuple(
            Override(
                match=name,
                bits=plan[name].bits,
                symmetric=plan[name].symmetric,
                group_size=plan[name].group_size or "channel",
                inputs="int8" if plan[name].inputs else "none",
                zero_points="free" if plan[name].free_minima else "integer",
            )
            if not plan[name].k_quant
            else Override(match=name, bits=plan[name].bits, k_quant=True)
            for name in names
            if name in plan
        )
        ignore = tuple(name for name in names if name not in plan)
        return self.model_copy(update={"bits": 4, "ignore": ignore, "overrides": overrides})

    def planned(self, source: Checkpoint) -> Self:
        """The stage as it is, or with the schemes of the plan that its input carries."""
        if not self.follows_plan:
            return self
        plan, architecture = source.precision_plan, source.architecture
        assert plan is not None, "steps.checks refuses bits: planned where no stage before planned"
        blocks = 1 + max(index for name in source.names if (index := architecture.block_index(name)) is not None)
        names = [f"{architecture.block_name(index)}.{leaf}" for index in range(blocks) for leaf in architecture.linears]
        return self.following(plan, names)

    def scheme_of(self, module: str) -> Scheme | None:
        """The scheme of one module, or None if it is ignored."""
        assert self.bits != "planned", "a stage that follows a plan is asked once the plan is in it"
        if any(matches(pattern, module) for pattern in self.ignore):
            return None
        bits, symmetric, size, inputs = self.bits, self.symmetric, self.group_size, self.inputs
        k_quant, zero_points = self.k_quant, self.zero_points
        for override in self.overrides:
            if matches(override.match, module):
                bits = override.bits or bits
                symmetric = symmetric if override.symmetric is None else override.symmetric
                if override.zero_points == "free" and override.symmetric is None:
                    symmetric = False
                size = override.group_size or size
                inputs = override.inputs or inputs
                zero_points = override.zero_points or zero_points
                k_quant = k_quant and not override.leaves_k_quants if override.k_quant is None else override.k_quant
        if k_quant and bits in K_QUANTS:
            return Scheme.of_k_quant(bits)
        free = zero_points == "free" and not symmetric
        group = None if size == "channel" else size
        return Scheme(bits, symmetric, group, 8 if inputs == "int8" else None, free_minima=free)

    def schemes(self, shapes: Shapes) -> dict[str, Scheme]:
        if self.follows_plan:
            return {}
        found = {module: self.scheme_of(module) for module in shapes}
        return {module: scheme for module, scheme in found.items() if scheme is not None}

    def check(self, shapes: Shapes, architecture: Architecture) -> list[str]:
        if self.follows_plan:
            return []
        return [
            *patterns_that_match_nothing(self.ignore, [override.match for override in self.overrides], shapes),
            *([] if self.schemes(shapes) or not shapes else [NOTHING_LEFT]),
            *groups_that_do_not_divide(self.schemes(shapes), shapes, architecture),
            *super_blocks_that_do_not_divide(self.schemes(shapes), shapes),
            *self._no_such_k_quants(shapes),
            *integer_inputs_that_do_not_fit(self.schemes(shapes)),
        ]

    def _no_such_k_quants(self, shapes: Shapes) -> list[str]:
        """One sentence for each override that asks for K-quants of a width that overrides before it gave."""
        found = {}
        for override in self.overrides:
            for module in shapes:
                scheme = self.scheme_of(module)
                last = [each for each in self.overrides if matches(each.match, module)][-1:]
                if override.k_quant and last == [override] and scheme and scheme.k_quant is None:
                    found[override.match] = f"overrides, {override.match!r}: {no_k_quant(scheme.bits)}"
        return list(found.values())

    def kept_events(self, modules: list[str]) -> list[Event]:
        """One event for each linear that stays in its source precision."""
        return [kept(module) for module in modules if self.scheme_of(module) is None]


def left_to_the_plan(stage: Stage, *fields: str) -> None:
    """Raises ValueError where a stage that follows a plan is given what the plan says."""
    changed = sorted(set(fields) & stage.changed_fields)
    if changed:
        raise ValueError(f"bits: planned leaves {', '.join(changed)} to the mixed_precision stage; give it there")
