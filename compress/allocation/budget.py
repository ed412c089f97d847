"""What people have, as bytes that linears may take.

    effective_bits   8 x bytes of the matrices that are chosen for, with scales, zero points and shapes / their weights
    weight_bytes     all tensors of the export: those that are not chosen for are taken off
    ratio            weight_bytes as a share of the source's
    serving_bytes    what a card has for one replica: the KV cache of `concurrency` sequences of `context` tokens, the
                     activations of a prefill, and what the runtime takes for itself are taken off first

Activations are those of `prefill_tokens` at once inside one block, as a serving runtime holds them: the residual and
the normed stream, q, k, v and attention's output, twice the inner width of the MLP; and logits of every sequence in
float32.

Example: 6 GiB with 2.5 GiB of KV cache, 1 GiB of runtime and 0.2 GiB of activations leave 2.3 GiB for weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from compress.architecture import Dimensions
from compress.memory.predict import Format, kv_cache_bytes
from compress.memory.predict import stored_bytes as weight_bytes
from compress.quantization.scheme import Scheme

KINDS = ("effective_bits", "weight_bytes", "ratio", "serving_bytes")


@dataclass(frozen=True)
class Sizes:
    """What a budget is computed against. Bytes as they will be exported."""

    matrices: dict[str, tuple[int, int]]
    """(rows, columns) of what is chosen for: linears, and the embedding and the head where they are."""
    other_bytes: int
    """All other tensors of the export."""
    source_bytes: int
    dimensions: Dimensions
    stored_bytes: int
    """Of one number in the export's 16-bit dtype."""

    @classmethod
    def of(
        cls,
        parameters: dict[str, tuple[int, ...]],
        matrices: dict[str, tuple[int, int]],
        dimensions: Dimensions,
        stored_bytes: int,
        source_bytes: int,
        format_: Format,
        packed: Mapping[str, Scheme],
    ) -> Sizes:
        """`parameters`: the shape of every stored one; `matrices`: of those that are chosen for; `packed`: schemes of
        matrices that were quantised already, the embedding or the head; `format_`: what will hold them."""
        outside = {name: shape for name, shape in parameters.items() if name.removesuffix(".weight") not in matrices}
        shapes = {module: parameters[f"{module}.weight"] for module in packed}
        of_packed = {module: (rows, columns) for module, (rows, columns) in shapes.items()}
        others = weight_bytes(outside, of_packed, dict(packed), stored_bytes, format_)
        return cls(matrices, others, source_bytes, dimensions, stored_bytes)

    @property
    def weights(self) -> int:
        return sum(rows * columns for rows, columns in self.matrices.values())


class Budget(BaseModel):
    """One of effective_bits, weight_bytes, ratio, serving_bytes; the other fields belong to serving_bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    effective_bits: float | None = Field(
        default=None,
        gt=0,
        le=32,
        description="bits per weight, with scales: of linears, and of the vocabulary where that is chosen for",
    )
    weight_bytes: int | None = Field(default=None, gt=0, description="bytes of all tensors of the export")
    ratio: float | None = Field(default=None, gt=0, le=1, description="of the source's tensor bytes")
    serving_bytes: int | None = Field(default=None, gt=0, description="memory of one replica while it serves")
    context: int = Field(default=4096, gt=0, description="tokens of a sequence in the KV cache")
    concurrency: int = Field(default=1, gt=0, description="sequences served at once")
    kv_cache_bits: Literal[8, 16] = Field(default=16, description="of a number in the KV cache")
    prefill_tokens: int = Field(default=2048, gt=0, description="tokens that go through a block at once")
    runtime_bytes: int = Field(
        default=2**30, ge=0, description="what the runtime takes for itself (CUDA context, graphs, workspaces)"
    )

    @model_validator(mode="after")
    def _one(self) -> Budget:
        given = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            said = f"{' and '.join(given)} are given" if given else "none is given"
            raise ValueError(f"a budget is exactly one of {', '.join(KINDS)}; {said}")
        fields = type(self).model_fields
        extra = {name for name in self.model_fields_set - {given[0]} if getattr(self, name) != fields[name].default}
        if extra and given[0] != "serving_bytes":
            raise ValueError(f"{', '.join(sorted(extra))} belong to serving_bytes, and the budget is {given[0]}")
        return self

    @property
    def kind(self) -> str:
        return next(kind for kind in KINDS if getattr(self, kind) is not None)

    @property
    def amount(self) -> float:
        return float(getattr(self, self.kind))

    def taken(self, sizes: Sizes) -> dict[str, int]:
        """Bytes that serving takes beside weights: KV cache, activations, runtime. Empty for other budgets."""
        if self.serving_bytes is None:
            return {}
        cache = kv_cache_bytes(sizes.dimensions, self.context, self.concurrency, self.kv_cache_bits // 8)
        return {
            "kv_cache": cache,
            "activations": activation_bytes(sizes, self.prefill_tokens, self.concurrency),
            "runtime": self.runtime_bytes,
        }

    def linear_bytes(self, sizes: Sizes) -> int:
        """Bytes that the linears may take; negative where not even the rest fits."""
        if self.effective_bits is not None:
            return math.floor(self.effective_bits * sizes.weights / 8)
        if self.ratio is not None:
            return math.floor(self.ratio * sizes.source_bytes) - sizes.other_bytes
        whole = self.weight_bytes if self.weight_bytes is not None else self.serving_bytes
        assert whole is not None
        return whole - sum(self.taken(sizes).values()) - sizes.other_bytes

    def amount_for(self, linear_bytes: int, sizes: Sizes) -> float:
        """The budget, in its own unit, that leaves linears so many bytes: what an error offers."""
        if self.effective_bits is not None:
            return 8 * linear_bytes / sizes.weights
        whole = linear_bytes + sizes.other_bytes
        if self.ratio is not None:
            return whole / sizes.source_bytes
        return float(whole + sum(self.taken(sizes).values()))

    def explained(self, sizes: Sizes, what: str = "linears") -> str:
        """What of the budget goes where: 'serving_bytes 6,000,000,000, in bytes: kv cache ..., linears at most ...'.
        `what`: what is chosen for."""
        parts = [f"{name.replace('_', ' ')} {size:,}" for name, size in self.taken(sizes).items()]
        if self.effective_bits is None:
            parts.append(f"tensors that stay as they are {sizes.other_bytes:,}")
        parts.append(f"{what} at most {self.linear_bytes(sizes):,}")
        amount = f"{self.amount:,.0f}" if self.kind.endswith("bytes") else f"{self.amount:g}"
        return f"{self.kind} {amount}, in bytes: {', '.join(parts)}"

    def words(self, amount: float) -> str:
        """An amount of this budget's kind, rounded up so that it can be asked for."""
        if self.kind in ("effective_bits", "ratio"):
            return f"{self.kind} {math.ceil(amount * 10_000) / 10_000:g}"
        return f"{self.kind} {math.ceil(amount)}"


def activation_bytes(sizes: Sizes, prefill_tokens: int, concurrency: int) -> int:
    """Activations of a prefill inside one block, and logits of every sequence."""
    dimensions = sizes.dimensions
    attention = 2 * (dimensions.heads + dimensions.kv_heads) * dimensions.head_dim
    inside = prefill_tokens * (2 * dimensions.hidden + attention + 2 * dimensions.mlp_width) * sizes.stored_bytes
    return inside + concurrency * dimensions.vocabulary * 4
