"""The model's shapes along the stages: what each stage reads, and what comes out at the end. Pruning changes them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from compress.architecture import Architecture, Dimensions, dimensions_of
from compress.checkpoints.skeleton import Skeleton
from compress.errors import RecipeError
from compress.recipe import Recipe
from compress.stages import Stage


@dataclass(frozen=True)
class Shape:
    """A model's config, and what follows from it. Holds no weights."""

    config: dict[str, Any]

    @cached_property
    def skeleton(self) -> Skeleton:
        return Skeleton(self.config, torch.device("cpu"), torch.float32)

    @cached_property
    def dimensions(self) -> Dimensions:
        return dimensions_of(self.skeleton.config)

    @cached_property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """(rows, columns) of every linear of every block, by full module name."""
        return self.skeleton.linear_shapes()

    @cached_property
    def vocabulary(self) -> dict[str, tuple[int, int]]:
        """(rows, columns) of the embedding, and of the head unless it is tied, by module name."""
        names = (f"{module}.weight" for module in (self.architecture.embedding, self.architecture.head))
        found = {name: self.tensors[name] for name in names if name in self.tensors}
        return {name.removesuffix(".weight"): (rows, columns) for name, (rows, columns) in found.items()}

    @property
    def everything(self) -> dict[str, tuple[int, int]]:
        """All that stages can quantise."""
        return self.matrices | self.vocabulary

    def of(self, stage: Stage) -> dict[str, tuple[int, int]]:
        """What a stage works on: linears, embedding and head, or all of them."""
        if stage.beside_linears:
            return self.everything
        return self.vocabulary if stage.on_vocabulary else self.matrices

    @cached_property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Shape of every stored parameter."""
        return self.skeleton.parameter_shapes()

    @property
    def architecture(self) -> Architecture:
        return self.skeleton.architecture

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.tensors.values())


@dataclass(frozen=True)
class Shapes:
    """`before[i]` is what stage i reads, `last` what the last stage leaves."""

    before: tuple[Shape, ...]
    last: Shape

    @property
    def source(self) -> Shape:
        return self.before[0] if self.before else self.last


def shapes_along(recipe: Recipe, config: dict[str, Any], stored_bytes: int) -> tuple[Shapes, list[str]]:
    """Shapes before each stage and after the last, and what is wrong with stages that change them; behind a mistake the
    shapes stay as they were."""
    current, before, mistakes = Shape(config), [], []
    for index, stage in enumerate(recipe.stages):
        before.append(current)
        try:
            changed = stage.configured(current.config, stored_bytes)
        except RecipeError as error:
            mistakes += [f"{recipe.place(index)}: {sentence}" for sentence in error.mistakes]
            continue
        current = current if changed == current.config else Shape(changed)
    return Shapes(tuple(before), current), mistakes
