"""Mistakes of a recipe that no single field can see, each with its line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compress.calibration.texts import SelfGenerated, missing
from compress.calibration.window_specs import CalibrationSpec, WindowSpec
from compress.checkpoints.formats import FORMATS
from compress.errors import CompressError, nearest
from compress.evaluation.latency.spec import Latency
from compress.evaluation.prompts.spec import Prompts, read_prompts
from compress.evaluation.specs import OnText
from compress.evaluation.tasks.items import draw
from compress.evaluation.tasks.spec import Task
from compress.recipe.bounds import bounds_of
from compress.recipe.model import Recipe
from compress.recipe_errors import Lines
from compress.stages.mixed_precision import MixedPrecision


def cross_check(recipe: Recipe, base: Path, lines: Lines, judging: bool) -> list[str]:
    """Mistakes that no single field can see."""
    mistakes: list[str] = []
    for index, stage in enumerate(recipe.stages):
        if stage.needs_calibration and recipe.calibration is None:
            place = lines.place(("stages", index))
            mistakes.append(
                f"{place}: {stage.kind} needs a calibration text; add `calibration:` (e.g. data: python-help)"
            )
        if isinstance(stage, MixedPrecision) and stage.needs_bounds and not bounds_of(recipe.gates):
            mistakes.append(
                f"{lines.place(('stages', index))}: stop: first_pass looks for the smallest mixture that the gates "
                "would pass, and none bounds a mean KL or a perplexity; add such a gate, or bounds: {max_kl: ...}"
            )
    mistakes += _texts(recipe, base, lines, judging)
    mistakes += _sets(recipe, lines)
    mistakes += _tasks(recipe, base, lines)
    mistakes += _latency(recipe, lines)
    known = recipe.measures()
    if all(gate.tier != "critical" for gate in recipe.gates):
        mistakes.append(
            f"{lines.place(('gates',))}: no gate is critical, so nothing could fail; make one tier: critical"
        )
    for index, gate in enumerate(recipe.gates):
        for measure in gate.measures:
            sentence = _gate_mistake(recipe, gate, measure, known)
            if sentence:
                mistakes.append(f"{lines.place(('gates', index, 'measure'))}: {sentence}")
    return mistakes


def _gate_mistake(recipe: Recipe, gate: Any, measure: str, known: list[str]) -> str | None:
    """Why a gate could never be judged as it is written, or None."""
    if measure not in known:
        return f"nothing measures {measure!r}.{nearest(measure, known)} Measured: {', '.join(known)}"
    if gate.kind == "non_inferiority" and not _is_paired(measure):
        return f"{measure} is not compared item by item; take perplexity, divergence.<set>.mean_kl or task accuracy"
    relative = gate.kind == "relative"
    both = [name for name in known if name.startswith(("perplexity.", "task.", "latency."))] + ["weight_bytes"]
    if relative and measure not in both:
        return f"the source has no {measure}, so there is no ratio; relative gates take {', '.join(both)}"
    if (
        getattr(gate, "use_interval", False)
        and not measure.startswith(("perplexity.", "latency."))
        and (relative or not _has_interval(measure))
    ):
        return f"{measure} has no interval; leave out use_interval, or judge perplexity, mean_kl or top1_agreement"
    if recipe.export.format == "gguf" and (measure in _OF_A_ROUND_TRIP or measure.startswith("round_trip.")):
        return f"no public loader keeps a .gguf file packed, so there is no round trip, and no {measure}"
    if measure == "effective_bits" and not FORMATS[recipe.export.format].packs:
        return f"format {recipe.export.format} packs nothing, so there are no effective_bits"
    return None


_OF_A_ROUND_TRIP = ("resident_bytes", "kv_cache_bytes")
"""Measured while the export is reloaded publicly, beside `round_trip.*` itself."""
_PAIRED = {("divergence", "mean_kl"), ("task", "accuracy"), ("task", "accuracy_norm")}


def _is_paired(measure: str) -> bool:
    """Whether both models' scores are kept by item or window."""
    kind, _, rest = measure.partition(".")
    return kind == "perplexity" or (kind, rest.rpartition(".")[2]) in _PAIRED


def _has_interval(measure: str) -> bool:
    return measure.startswith("task.") or (
        measure.startswith("divergence.") and measure.endswith((".mean_kl", ".top1_agreement"))
    )


def _texts(recipe: Recipe, base: Path, lines: Lines, judging: bool) -> list[str]:
    """Named texts must exist, and local files that will be read must be there."""
    specs: list[tuple[tuple[str | int, ...], WindowSpec]] = []
    if recipe.calibration is not None:
        specs.append((("calibration", "data"), recipe.calibration))
    specs += [
        (("evaluation", index, "data"), spec)
        for index, spec in enumerate(recipe.evaluation)
        if isinstance(spec, OnText)
    ]
    mistakes = []
    for path, spec in specs:
        try:
            descriptor, folder = spec.descriptor(base)
        except CompressError as error:
            mistakes.append(f"{lines.place(path)}: {error}")
            continue
        unread = judging and path[0] == "calibration"
        reason = None if unread else missing(descriptor.source, folder)
        if reason:
            mistakes.append(f"{lines.place(path)}: {reason}")
        beside = isinstance(spec, CalibrationSpec) and spec.self_generated_windows > 0
        if beside and isinstance(descriptor.source, SelfGenerated):
            mistakes.append(
                f"{lines.place(path)}: {descriptor.name} is sampled from the model already; take more windows in place "
                "of self_generated_windows"
            )
        if path[0] == "evaluation" and isinstance(descriptor.source, SelfGenerated):
            mistakes.append(f"{lines.place(path)}: text sampled from the model cannot judge the model")
    return mistakes


def _sets(recipe: Recipe, lines: Lines) -> list[str]:
    """One set name means one set of windows, whoever measures it."""
    seen: dict[str, tuple[WindowSpec, int]] = {}
    mistakes = []
    for index, evaluation in enumerate(recipe.evaluation):
        if not isinstance(evaluation, OnText):
            continue
        name, windows = evaluation.set_name, (evaluation.window_spec, evaluation.windows)
        if seen.setdefault(name, windows) != windows:
            mistakes.append(
                f"{lines.place(('evaluation', index))}: set {name!r} is defined twice with different windows; give one "
                "of them another `set:` name, or make them equal"
            )
    return mistakes


def _tasks(recipe: Recipe, base: Path, lines: Lines) -> list[str]:
    """Tasks have names of their own and files without mistakes; and some text is measured beside them."""
    named: set[str] = set()
    mistakes = []
    for index, spec in enumerate(recipe.evaluation):
        if not isinstance(spec, Task):
            continue
        wrong = draw(spec.absolute(base), recipe.seed)[1] if spec.file is not None else []
        if spec.label in named:
            wrong = [f"task {spec.label!r} is named twice; give one another `name:`", *wrong]
        named.add(spec.label)
        mistakes += [f"{lines.place(('evaluation', index))}: {sentence}" for sentence in wrong]
    for index, spec in enumerate(recipe.evaluation):
        if isinstance(spec, Task) and spec.label in {each.set_name for each in recipe.on_text}:
            mistakes.append(
                f"{lines.place(('evaluation', index))}: a task and a text are both called {spec.label!r}; give one "
                "another name"
            )
    mistakes += _prompts(recipe, base, lines)
    if not recipe.on_text:
        mistakes.append(
            f"{lines.place(('evaluation',))}: no text is evaluated; add a perplexity or a divergence, whose text "
            "also tells whether the source is healthy and whether the export loads"
        )
    return mistakes


def _latency(recipe: Recipe, lines: Lines) -> list[str]:
    """Time is measured in one way."""
    found = [index for index, spec in enumerate(recipe.evaluation) if isinstance(spec, Latency)]
    return [f"{lines.place(('evaluation', index))}: latency is measured twice; keep one" for index in found[1:]]


def _prompts(recipe: Recipe, base: Path, lines: Lines) -> list[str]:
    """At most one set of prompts, of a file without mistakes."""
    found = [(index, spec) for index, spec in enumerate(recipe.evaluation) if isinstance(spec, Prompts)]
    mistakes = [f"{lines.place(('evaluation', index))}: prompts are asked twice; keep one" for index, _ in found[1:]]
    for index, spec in found[:1]:
        wrong = read_prompts(spec.absolute(base))[1]
        mistakes += [f"{lines.place(('evaluation', index, 'file'))}: {sentence}" for sentence in wrong]
    return mistakes
