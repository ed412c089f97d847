"""Adam with linear warm-up and decay over shuffled windows, judged on windows kept out; the best state seen remains.

The held-out value is taken before the first step and a few times an epoch. If it does not improve `patience` times in a
row (where codes move, not before three fifths of all steps), or the loss is no longer finite, training stops. The start
counts as a state: training that never helps changes nothing. Every 20 seconds and more the whole state is written, and
a killed run repeats only the steps after that; order and arithmetic depend on seed and step alone, so its result is
that of an uninterrupted one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from compress.training import saved
from compress.training.clock import Clock
from compress.training.material import Material

EVALUATIONS_PER_EPOCH = 3
SECONDS_BETWEEN_SAVES = 20.0
SAVING_SHARE = 20.0
"""Further seconds of training for one of saving: the state of all weights is gigabytes."""
WARM_UP = 0.2
"""Of all steps. Adam's first steps have the full length in the direction of one batch's noise."""
SETTLING = 0.6
"""Of all steps: before that, codes that move raise what they lower afterwards, and patience would end in between."""
BETAS = (0.9, 0.95)
"""A run is tens or hundreds of steps: squares of gradients are averaged over twenty, not a thousand."""
EPSILON = 1e-12
"""Gradients of factors are small: a mean over tokens, shared out among millions. The step should not depend on that."""


class Objective(Protocol):
    """What is lowered, as a function of `factors` (leaf parameters, float32, by name)."""

    @property
    def factors(self) -> dict[str, nn.Parameter]: ...

    def rates(self, way: float) -> dict[str, float]:
        """What the learning rate is multiplied by, by the same names; absent for 1. `way`: steps at the full learning
        rate that all steps amount to."""
        ...

    def loss(self, rows: Tensor) -> Tensor | None:
        """Scalar loss with its graph on the windows `rows`, or None if they hold nothing that counts."""

    def held_out(self) -> float:
        """The same mean over all windows kept out, in the arithmetic of what is stored."""


@dataclass(frozen=True)
class Course:
    """How far and how fast: the largest learning rate, of a relative change; patience in evaluations."""

    epochs: int
    learning_rate: float
    patience: int
    seed: int


@dataclass
class Descended:
    """How it went. `history` holds (step, held-out value), the start first; the parameters are at the best of them."""

    step: int = 0
    history: list[tuple[int, float]] = field(default_factory=list)
    stopped: str = ""

    @property
    def best_step(self) -> int:
        """The first step with the lowest held-out value; not a number is never the lowest."""
        return min(self.history, key=lambda point: (math.inf if math.isnan(point[1]) else point[1], point[0]))[0]

    @property
    def before(self) -> float:
        return self.history[0][1]

    @property
    def after(self) -> float:
        return dict(self.history)[self.best_step]

    def facts(self) -> dict[str, Any]:
        """What a report says of it."""
        curve = [f"{step}: {value:.5g}" for step, value in self.history]
        return {"steps": self.step, "best_step": self.best_step, "stopped": self.stopped, "held_out": curve}

    def evaluations_since_best(self) -> int:
        return sum(step > self.best_step for step, _ in self.history)


def descend(
    objective: Objective,
    material: Material,
    course: Course,
    path: Path,
    clock: Clock,
    advance: Callable[[str], None],
) -> Descended:
    """Train the objective's factors and leave them at the best state. `path` is the file a killed run goes on from;
    it stays, for the caller to remove once the result is safe. `advance` is called once a step."""
    parameters = objective.factors
    total = steps_of(material, course)
    rates = objective.rates(sum(share_of_rate(step, total) for step in range(total)))
    groups = [{"params": [parameter], "rate": rates.get(name, 1.0)} for name, parameter in parameters.items()]
    if not rates:
        groups = [{"params": [*parameters.values()], "rate": 1.0}]
    adam = torch.optim.Adam(groups, lr=course.learning_rate, betas=BETAS, eps=EPSILON)
    state, best = _started(objective, adam, path, clock)
    for _ in range(state.step):
        advance("going on")
    written, wait = time.monotonic(), SECONDS_BETWEEN_SAVES
    for rows in _remaining(material, course, state):
        for group in adam.param_groups:
            group["lr"] = group["rate"] * course.learning_rate * share_of_rate(state.step, total)
        with clock.timed("training"):
            loss = _step(objective, rows, adam)
        state.step += 1
        if not math.isfinite(loss):
            state.stopped = f"the loss was {loss} at step {state.step}"
        elif state.step % (total // course.epochs) in _evaluated(total // course.epochs):
            with clock.timed("held-out"):
                state.history.append((state.step, objective.held_out()))
            if state.best_step == state.step:
                best = _copy(parameters)
            settling = bool(rates) and state.step < SETTLING * total
            if state.evaluations_since_best() >= course.patience and not settling:
                state.stopped = f"no better for {course.patience} evaluations"
        advance(f"loss {loss:.4g}, held out {state.history[-1][1]:.4g} (at first {state.before:.4g})")
        if state.stopped or state.step == total or time.monotonic() - written > wait:
            started = time.monotonic()
            _save(path, state, adam, parameters, best, clock)
            written = time.monotonic()
            wait = SECONDS_BETWEEN_SAVES + SAVING_SHARE * (written - started)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(best[name])
    return state


def share_of_rate(step: int, total: int) -> float:
    """Of the learning rate at a step, 0 to 1: a linear rise over WARM_UP of all steps, and a linear fall to zero."""
    return min((step + 1) / (WARM_UP * total + 1), (1 - step / total) / (1 - WARM_UP))


def steps_of(material: Material, course: Course) -> int:
    return course.epochs * len(material.epoch(0, course.seed))


def _step(objective: Objective, rows: Tensor, adam: torch.optim.Adam) -> float:
    """One step; returns the loss before it. A loss that is not finite moves nothing."""
    loss = objective.loss(rows)
    if loss is None:
        return 0.0
    value = float(loss.detach())
    if math.isfinite(value):
        adam.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        adam.step()
    return value


def _remaining(material: Material, course: Course, state: Descended) -> Iterator[Tensor]:
    """The batches after those that `state` has seen, until it stops."""
    seen = state.step
    for epoch in range(course.epochs):
        for rows in material.epoch(epoch, course.seed):
            if state.stopped:
                return
            if seen:
                seen -= 1
            else:
                yield rows


def _evaluated(per_epoch: int) -> set[int]:
    """Steps within an epoch after which the held-out value is taken; 0 stands for the epoch's end."""
    times = min(EVALUATIONS_PER_EPOCH, per_epoch)
    return {round(per_epoch * time / times) % per_epoch for time in range(1, times + 1)}


def _started(
    objective: Objective, adam: torch.optim.Adam, path: Path, clock: Clock
) -> tuple[Descended, dict[str, Tensor]]:
    """The state to go on from, and the best factors so far."""
    parameters = objective.factors
    found = saved.load(path)
    if found is None:
        with clock.timed("held-out"):
            state = Descended(history=[(0, objective.held_out())])
        return state, _copy(parameters)
    tensors, facts = found
    clock.carry(facts["seconds"])
    state = Descended(facts["step"], [(step, value) for step, value in facts["history"]], facts["stopped"])
    for name, parameter in parameters.items():
        with torch.no_grad():
            parameter.copy_(tensors[f"factor.{name}"])
        if f"first.{name}" in tensors:
            adam.state[parameter] = {
                "step": tensors[f"count.{name}"],
                "exp_avg": tensors[f"first.{name}"].to(parameter.device),
                "exp_avg_sq": tensors[f"second.{name}"].to(parameter.device),
            }
    return state, {name: tensors[f"best.{name}"].to(parameter.device) for name, parameter in parameters.items()}


def _save(
    path: Path,
    state: Descended,
    adam: torch.optim.Adam,
    parameters: dict[str, nn.Parameter],
    best: dict[str, Tensor],
    clock: Clock,
) -> None:
    tensors: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        tensors[f"factor.{name}"], tensors[f"best.{name}"] = parameter, best[name]
        moments: dict[str, Any] = adam.state.get(parameter, {})
        if moments:
            tensors[f"count.{name}"] = moments["step"]
            tensors[f"first.{name}"], tensors[f"second.{name}"] = moments["exp_avg"], moments["exp_avg_sq"]
    facts = {"step": state.step, "history": state.history, "stopped": state.stopped, "seconds": clock.seconds}
    saved.save(path, tensors, facts)


def _copy(parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}
