"""Names of linears as recipes give them, and what cannot be of the schemes that a stage gives to linears of a model.

Every check takes schemes by module and shapes (rows, columns), and gives sentences.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable

from compress.architecture import Architecture
from compress.errors import nearest
from compress.quantization.scheme import Scheme, usable_group_sizes
from compress.quantization.super_blocks import SUPER
from compress.stages.base import Shapes

NOTHING_LEFT = "ignore: every linear is ignored, so nothing is quantised"


def matches(pattern: str, module: str) -> bool:
    """Whether a module name matches: a glob ('*.down_proj', 'model.layers.0.*'), or 're:' and a regular expression."""
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], module) is not None
    return fnmatch.fnmatchcase(module, pattern) or fnmatch.fnmatchcase(module, f"*.{pattern}")


def checked_pattern(pattern: str) -> str:
    if pattern.startswith("re:"):
        try:
            re.compile(pattern[3:])
        except re.error as error:
            raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error
    return pattern


def patterns_that_match_nothing(ignored: Iterable[str], overridden: Iterable[str], shapes: Shapes) -> list[str]:
    """One sentence for each pattern of `ignore` and `overrides` that no linear has, with the nearest name."""
    patterns = [("ignore", pattern) for pattern in ignored] + [("overrides", pattern) for pattern in overridden]
    leaves = sorted({module.rsplit(".", 1)[-1] for module in shapes})
    return [
        f"{field}: pattern {pattern!r} matches no linear.{nearest(pattern.lstrip('*.'), leaves)} "
        f"Linears are named like {next(iter(shapes))}."
        for field, pattern in patterns
        if not any(matches(pattern, module) for module in shapes)
    ]


def integer_inputs_that_do_not_fit(schemes: dict[str, Scheme]) -> list[str]:
    """One sentence for each scheme that asks for integer inputs beside weights that no kernel multiplies them with."""
    found: dict[Scheme, list[str]] = {}
    for module, scheme in schemes.items():
        if scheme.inputs and (scheme.bits, scheme.symmetric, scheme.group_size) != (8, True, None):
            found.setdefault(scheme, []).append(module)
    return [
        f"{modules[0]}: {scheme.label}: int8 inputs go with bits: 8, symmetric: true, group_size: channel; give those, "
        "or leave inputs out"
        for scheme, modules in found.items()
    ]


def groups_that_do_not_divide(
    schemes: dict[str, Scheme], shapes: Shapes, architecture: Architecture, multiples_of: int = 1
) -> list[str]:
    """One sentence for each (kind of linear, width, group size), naming the first module and how many more.

    `multiples_of`: what a group must be one of beside, and a whole row too; 0 where modules have no sizes of their own.
    """
    found: dict[tuple[str, int, int], list[str]] = {}
    for module, scheme in schemes.items():
        columns = shapes[module][1]
        if scheme.k_quant:
            continue
        if not scheme.divides(columns):
            key = (module.rsplit(".", 1)[-1], columns, scheme.width(columns))
            found.setdefault(key, []).append(module)
    sentences = []
    for (leaf, columns, size), modules in found.items():
        offered = [*map(str, usable_group_sizes(columns, size, multiples_of))] if multiples_of else []
        offered += ["channel"] * bool(multiples_of and columns % multiples_of == 0)
        change = f"use group_size {_either(offered)} for {leaf} (overrides), or ignore it" if offered else "ignore it"
        more = f" (and {len(modules) - 1} more like it)" if len(modules) > 1 else ""
        sentences.append(f"{modules[0]}{more}: {columns} input columns do not divide into groups of {size}; {change}")
    return sentences


def super_blocks_that_do_not_divide(schemes: dict[str, Scheme], shapes: Shapes) -> list[str]:
    """One sentence for each kind of linear whose columns do not divide into super-blocks, with an override to paste, or
    for all where no columns do."""
    found: dict[tuple[str, int], list[str]] = {}
    for module, scheme in schemes.items():
        columns = shapes[module][1]
        if scheme.k_quant and not scheme.divides(columns):
            found.setdefault((module.rsplit(".", 1)[-1], columns), []).append(module)
    asked = [module for module, scheme in schemes.items() if scheme.k_quant]
    if asked and len(asked) == sum(map(len, found.values())):
        widths = ", ".join(map(str, sorted({columns for _, columns in found})))
        return [f"no input columns here ({widths}) divide by the {SUPER} of a K-quant; leave k_quant out"]
    sentences = []
    for (leaf, columns), modules in found.items():
        change = "ignore it"
        if columns % 32 == 0:
            change = f"give it another grid: overrides: [{{match: '*.{leaf}', group_size: 32}}]"
        more = f" (and {len(modules) - 1} more like it)" if len(modules) > 1 else ""
        sentences.append(
            f"{modules[0]}{more}: {columns} input columns do not divide by the {SUPER} of a K-quant; {change}"
        )
    return sentences


def _either(words: list[str]) -> str:
    return " or ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]
