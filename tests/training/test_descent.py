"""The loop on a parabola: what is kept, when it stops, and that a kill changes nothing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from compress.training import descent
from compress.training.clock import Clock
from compress.training.descent import Course, descend
from compress.training.material import material
from tests.tiny import random_windows

TEXT = material(random_windows(count=14), None, 0.15, 24, seed=0)


class Parabola:
    """Lowest at 0.05 for the training rows, at `judged` for those kept out. Rows shift the target a little."""

    def __init__(self, judged=0.05, broken_at=math.inf):
        self.factor, self.judged, self.broken_at, self.losses = nn.Parameter(torch.zeros(3)), judged, broken_at, 0

    @property
    def factors(self):
        return {"factor": self.factor}

    def rates(self, way):
        return {}

    def loss(self, rows):
        self.losses += 1
        if self.losses >= self.broken_at:
            return self.factor.sum() * math.nan
        return (self.factor - 0.05 - 1e-3 * float(rows[0])).square().sum()

    def held_out(self):
        return float((self.factor.detach() - self.judged).square().sum())


def _descend(objective, path, advance=lambda note: None, **course):
    fields = {"epochs": 4, "learning_rate": 0.005, "patience": 4, "seed": 0, **course}
    return descend(objective, TEXT, Course(**fields), path / "step.safetensors", Clock(), advance)


def test_the_best_state_is_kept_and_not_the_last(tmp_path):
    objective = Parabola(judged=0.02)

    done = _descend(objective, tmp_path, patience=100)

    assert done.step == 48
    assert 0 < done.best_step < 48
    assert objective.held_out() == pytest.approx(done.after) and done.after < 0.3 * done.before


def test_it_stops_when_patience_ends(tmp_path):
    done = _descend(Parabola(judged=0.02), tmp_path, patience=2)

    assert done.step < 48 and done.stopped == "no better for 2 evaluations"
    assert done.evaluations_since_best() == 2


def test_a_direction_that_never_helps_leaves_the_start(tmp_path):
    objective = Parabola(judged=-0.05)

    done = _descend(objective, tmp_path)

    assert done.best_step == 0 and done.after == done.before
    assert not bool(objective.factor.any())


def test_a_loss_that_is_not_a_number_ends_it_at_the_best_state(tmp_path):
    objective = Parabola(broken_at=20)

    done = _descend(objective, tmp_path)

    assert done.step == 20 and "the loss was nan at step 20" in done.stopped
    assert math.isfinite(objective.held_out()) and done.after < done.before


def test_the_rate_rises_over_a_fifth_and_falls_to_nothing():
    shares = [descent.share_of_rate(step, 100) for step in range(100)]

    assert shares[0] == pytest.approx(1 / 21) and shares[20] == pytest.approx(1) == max(shares)
    assert shares[60] == pytest.approx(0.5) and shares[99] == pytest.approx(0.0125)
    for few in (1, 2, 3):
        assert 0.7 < max(descent.share_of_rate(step, few) for step in range(few)) <= 1


@pytest.mark.parametrize("killed_after", [1, 17, 47])
def test_a_killed_run_goes_on_to_the_same_bits(tmp_path, monkeypatch, killed_after):
    monkeypatch.setattr(descent, "SECONDS_BETWEEN_SAVES", -1.0)
    monkeypatch.setattr(descent, "SAVING_SHARE", 0.0)
    whole, again = Parabola(), Parabola()
    expected = _descend(whole, tmp_path / "whole", patience=100)
    calls = []

    def kill(note):
        calls.append(note)
        if len(calls) == killed_after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _descend(again, tmp_path / "killed", kill, patience=100)
    resumed = Parabola()
    done = _descend(resumed, tmp_path / "killed", patience=100)

    assert resumed.losses == 48 - (killed_after - 1), "only the step in flight is repeated"
    assert torch.equal(resumed.factor, whole.factor)
    assert done.history == expected.history
