"""Stages that choose a scheme for every linear, and stages that follow: whether they fit together, what to expect."""

from __future__ import annotations

from typing import Any

from compress.allocation.budget import Sizes
from compress.errors import RecipeError
from compress.quantization.scheme import Scheme
from compress.recipe import Recipe
from compress.stages.mixed_precision import MixedPrecision
from compress.stages.sensitivity import Sensitivity
from compress.steps.shapes import Shapes


def out_of_order(recipe: Recipe) -> list[str]:
    """Plans that nobody follows, followers without a plan, choices without candidates."""
    found, planned, coded = [], False, False
    chooser: MixedPrecision | None = None
    for index, stage in enumerate(recipe.stages):
        where = f"{recipe.place(index)}: "
        after = recipe.stages[index + 1 :]
        if stage.follows_plan and not planned:
            found.append(where + "bits: planned follows a mixed_precision stage, and none comes before it")
        if stage.follows_plan and stage.on_vocabulary and chooser and not chooser.vocabulary:
            found.append(where + "the mixed_precision stage before it chooses for linears; give it vocabulary: true")
        if stage.follows_plan and stage.on_vocabulary and any(each.follows_plan for each in recipe.stages[:index]):
            found.append(where + "put it right after mixed_precision, so that what follows sees what it has rounded")
        if stage.needs_weights and planned:
            found.append(
                where
                + f"{stage.kind} changes weights that a mixed_precision stage before it has measured; put it first"
            )
        if stage.kv_bytes and after:
            found.append(where + f"{stage.kind} calibrates the cache of the finished model; put it last")
        if stage.follows_plan and not stage.on_vocabulary and coded:
            found.append(where + "linears were quantised before it; one stage follows a plan")
        if isinstance(stage, MixedPrecision) and planned:
            found.append(where + "another mixed_precision stage has chosen already; leave one out")
        if isinstance(stage, MixedPrecision):
            planned, chooser = True, stage
            found += [where + said for said in _around_a_choice(recipe, index, stage)]
        if stage.on_vocabulary and planned and not stage.follows_plan:
            found.append(
                where
                + f"{stage.kind} changes what a mixed_precision stage before it has measured and counted; put it first"
            )
        if isinstance(stage, Sensitivity):
            if not (after and isinstance(after[0], MixedPrecision)):
                found.append(where + "sensitivity is read by a mixed_precision stage right after it, and there is none")
            if coded:
                found.append(where + "linears were quantised before it; choose schemes before quantising")
        coded = coded or stage.kind in ("gptq", "round_to_nearest", "bitsandbytes")
    return found


def _around_a_choice(recipe: Recipe, index: int, stage: MixedPrecision) -> list[str]:
    """What of the export, the stages before and those after does not fit a stage that chooses."""
    found = []
    if (recipe.export.format == "gguf") != (stage.format.name == "gguf"):
        found.append(
            f"runtime {stage.runtime}: its budget counts bytes of {stage.format.name}, and export.format is "
            f"{recipe.export.format}; gguf goes with runtime: llama.cpp"
        )
    before, after = recipe.stages[:index], recipe.stages[index + 1 :]
    if before and isinstance(before[-1], Sensitivity):
        given = before[-1].choice_fields.items()
        # What the arithmetic is done in decides no candidate.
        differing = [name for name, value in given if name != "products" and value != getattr(stage, name)]
        if differing:
            found.append(f"{', '.join(differing)} differ from those of the sensitivity stage before it")
    if stage.vocabulary and any(each.on_vocabulary for each in before):
        found.append("vocabulary: true chooses for what a vocabulary stage before it has rounded")
    if stage.vocabulary and not any(each.follows_plan and each.on_vocabulary for each in after):
        found.append("it chooses for embedding and head; add {kind: vocabulary, bits: planned} right after it")
    if not any(each.follows_plan and not each.on_vocabulary for each in after):
        found.append("nothing follows its plan; add a stage such as {kind: gptq, bits: planned} after it")
    return found


def expected_schemes(
    recipe: Recipe, shapes: Shapes, stored_bytes: int, source_bytes: int
) -> tuple[dict[str, Scheme], list[str], list[str]]:
    """The scheme of each matrix after all stages, budgets that nothing fits, and each budget explained. Where a stage
    will choose, a choice of about the same bytes stands in for its own."""
    schemes: dict[str, Scheme] = {}
    explained = []
    mistakes = []
    for index, (stage, shape) in enumerate(zip(recipe.stages, shapes.before, strict=True)):
        matrices = shape.of(stage)
        if isinstance(stage, MixedPrecision):
            units = stage.units(shape.architecture, matrices)
            chosen: dict[str, Any] = {module: matrices[module] for unit in units for module in unit.modules}
            packed = {name: each for name, each in schemes.items() if name in shape.vocabulary and name not in chosen}
            sizes = Sizes.of(shape.tensors, chosen, shape.dimensions, stored_bytes, source_bytes, stage.format, packed)
            explained.append(stage.explained(sizes))
            try:
                schemes.update(stage.schemes_within(sizes, units))
            except RecipeError as error:
                mistakes.append(f"{recipe.place(index)}: {error}")
        else:
            schemes.update(stage.schemes(matrices))
    return schemes, mistakes, explained
