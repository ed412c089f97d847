"""Linears of two artifacts side by side: changes of scheme counted, errors compared, the farthest named."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from statistics import median
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

MOST_LAYERS = 10
"""Layers that are named where thousands may differ."""


class Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class SchemeChange(Value):
    """Linears whose scheme went from one to another. None: the stage did not touch them."""

    a: str | None
    b: str | None
    linears: int
    examples: tuple[str, ...]


class Layer(Value):
    """A linear whose error differs."""

    name: str
    scheme_a: str | None
    scheme_b: str | None
    error_a: float | None
    error_b: float | None


class Layers(Value):
    """Linears, as the last stage that has a record of each left them; with the error of an earlier stage where that one
    measured none."""

    compared: int = Field(description="linears that both have")
    schemes: tuple[SchemeChange, ...] = Field(description="changes of scheme, the most frequent first")
    better: int = Field(description="linears of the same scheme whose error is smaller in b")
    worse: int
    median_error_ratio: float | None = Field(description="of b to a, over linears that have both errors")
    note: str = Field(default="", description="where errors are not those of what ships")
    farthest: tuple[Layer, ...] = Field(description=f"the {MOST_LAYERS} whose errors are farthest apart, as a ratio")


def layers(a: Mapping[str, Mapping[str, Any]], b: Mapping[str, Mapping[str, Any]], note: str = "") -> Layers:
    """Compare linears by name; values are records with `scheme` and `error`. `note`: what is to be said of errors."""
    pairs = [_layer(name, a.get(name, {}), b.get(name, {})) for name in [*a, *(name for name in b if name not in a)]]
    changes = Counter((layer.scheme_a, layer.scheme_b) for layer in pairs if layer.scheme_a != layer.scheme_b)
    same = [layer for layer in pairs if layer.scheme_a == layer.scheme_b]
    ratios = {layer.name: ratio for layer in pairs if (ratio := ratio_of(layer.error_a, layer.error_b)) is not None}
    far = sorted(
        (layer for layer in pairs if ratios.get(layer.name, 1.0) != 1.0),
        key=lambda layer: -abs(math.log(max(ratios[layer.name], 1e-300))),
    )
    return Layers(
        note=note,
        compared=len(set(a) & set(b)),
        schemes=tuple(
            SchemeChange(a=old, b=new, linears=count, examples=_examples(pairs, old, new))
            for (old, new), count in changes.most_common()
        ),
        better=sum(ratios.get(layer.name, 1.0) < 1 for layer in same),
        worse=sum(ratios.get(layer.name, 1.0) > 1 for layer in same),
        median_error_ratio=median(ratios.values()) if ratios else None,
        farthest=tuple(far[:MOST_LAYERS]),
    )


def _layer(name: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> Layer:
    return Layer(
        name=name,
        scheme_a=a.get("scheme"),
        scheme_b=b.get("scheme"),
        error_a=number(a.get("error")),
        error_b=number(b.get("error")),
    )


def _examples(pairs: list[Layer], old: str | None, new: str | None) -> tuple[str, ...]:
    return tuple(layer.name for layer in pairs if (layer.scheme_a, layer.scheme_b) == (old, new))[:3]


def ratio_of(a: float | None, b: float | None) -> float | None:
    return b / a if a and b is not None else None


def number(value: Any) -> float | None:
    """Reports write what JSON has no number for as 'NaN' and 'Infinity'."""
    return None if value is None or isinstance(value, bool) else float(value)
