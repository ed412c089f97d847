"""Calibration and evaluation windows of a run, disjoint or refused."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from compress.calibration.overlap import LIMIT, NGRAM, shared_fraction
from compress.calibration.texts import SelfGenerated
from compress.calibration.windows import Windows, build_windows
from compress.errors import RecipeError
from compress.evaluation.looks import look_sizes
from compress.events import Event, Progress
from compress.recipe import Recipe
from compress.steps.environment import Machine
from compress.steps.sampled import sampled_windows
from compress.steps.source import OpenedSource


@dataclass(frozen=True)
class Texts:
    """Token windows: `calibration` may be None; `evaluation` is by set name."""

    calibration: Windows | None
    evaluation: dict[str, Windows]
    overlap: dict[str, float]
    """Share of each evaluation set's n-grams found in the calibration windows."""
    more: dict[str, tuple[tuple[Windows, ...], ...]] = field(default_factory=dict)
    """By set, what each further look adds to `evaluation`, in pieces no larger than that."""

    def seen(self, name: str, looks: int) -> Windows:
        """All windows of a set after so many looks."""
        first = self.evaluation[name]
        pieces = [piece for look in self.more.get(name, ())[: looks - 1] for piece in look]
        return first.with_more(pieces) if pieces else first

    @property
    def events(self) -> list[Event]:
        kept = [self.calibration] if self.calibration else []
        return [event for windows in (*kept, *self.evaluation.values()) for event in windows.events]


def read_texts(recipe: Recipe, source: OpenedSource, machine: Machine, progress: Progress) -> Texts:
    """Build all windows. Raises RecipeError for empty texts and for evaluation text that was calibrated on."""
    base = Path.cwd()
    vocabulary = int(source.checkpoint.config["vocab_size"])
    evaluation = {}
    with progress.task("texts", len({spec.set_name for spec in recipe.on_text}) + 1) as advance:
        for spec in recipe.on_text:
            if spec.set_name not in evaluation:
                where = f"evaluation set {spec.set_name}"
                windows = build_windows(spec.window_spec, base, source.tokenizer, recipe.seed, where)
                evaluation[spec.set_name] = windows.distinct(spec.set_name)
                advance(spec.set_name)
        calibration = read_calibration(recipe, source, machine, progress)
        advance("calibration")
    for name, windows in {**evaluation, **({"calibration": calibration} if calibration else {})}.items():
        if int(windows.ids.max()) >= vocabulary:
            raise RecipeError(
                f"{name}: the tokenizer gives ids up to {int(windows.ids.max())}, the model knows {vocabulary}"
            )
    overlap = _overlap(calibration, evaluation)
    first, more = {}, {}
    for name, windows in evaluation.items():
        spec = next(spec for spec in recipe.on_text if spec.set_name == name)
        first[name], more[name] = _by_look(windows, spec.windows)
    return Texts(calibration, first, overlap, more)


def _by_look(windows: Windows, first: int) -> tuple[Windows, tuple[tuple[Windows, ...], ...]]:
    """The windows of the first look, and what each further one adds."""
    sizes = look_sizes(first, len(windows.ids))
    if len(sizes) == 1:
        return windows, ()
    step, more = sizes[0], []
    for start, stop in pairwise(sizes):
        more.append(tuple(windows.part(at, min(at + step, stop)) for at in range(start, stop, step)))
    return replace(windows.part(0, step), events=windows.events), tuple(more)


def read_calibration(recipe: Recipe, source: OpenedSource, machine: Machine, progress: Progress) -> Windows | None:
    """The windows of the calibration text alone, if the recipe has one."""
    spec = recipe.calibration
    if spec is None:
        return None
    descriptor, _ = spec.descriptor(Path.cwd())
    if isinstance(descriptor.source, SelfGenerated):
        spec = spec.model_copy(update={"data": descriptor.source})
        return sampled_windows(spec, source, recipe.seed, machine, progress)
    windows = build_windows(spec, Path.cwd(), source.tokenizer, recipe.seed, "calibration")
    if spec.self_generated_windows:
        own = sampled_windows(spec.of_model, source, recipe.seed, machine, progress)
        windows = windows.mixed_with(own, recipe.seed)
    return windows


def _overlap(calibration: Windows | None, evaluation: dict[str, Windows]) -> dict[str, float]:
    if calibration is None:
        return {name: 0.0 for name in evaluation}
    shared = {name: shared_fraction(calibration.ids, windows.ids) for name, windows in evaluation.items()}
    guilty = {name: share for name, share in shared.items() if share > LIMIT}
    if guilty:
        found = ", ".join(f"{name} ({share:.0%})" for name, share in guilty.items())
        raise RecipeError(
            f"evaluation text overlaps calibration text: {found} of its {NGRAM}-token runs occur in the calibration "
            f"windows, {LIMIT:.0%} are allowed. A model must be judged on text it was not calibrated on: name another."
        )
    return shared


def calibration_facts(windows: Windows | None) -> dict[str, Any]:
    """The calibration ledger for the report."""
    return windows.ledger if windows else {"name": None, "note": "no stage of this recipe reads calibration text"}
