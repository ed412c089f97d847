"""How many looks, and what each costs."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from compress.evaluation.looks import LARGEST, alpha_at_each, look_sizes


@pytest.mark.parametrize(
    ("first", "most", "sizes"),
    [
        (24, 24, (24,)),
        (24, 48, (24, 48)),
        (24, 100, (24, 48, 100)),
        (24, 25, (24, 25)),
        (24, 190, (24, 48, 96, 190)),
        (24, 20, (20,)),
    ],
)
def test_every_look_doubles_until_there_is_no_more(first, most, sizes):
    assert look_sizes(first, most) == sizes


def test_looks_are_bounded_and_rise():
    sizes = look_sizes(1, 10**9)
    assert len(sizes) <= LARGEST and list(sizes) == sorted(set(sizes))


def test_one_look_uses_all_of_alpha():
    assert alpha_at_each(0.05, (24,)) == 0.05


def test_two_looks_at_equal_steps_are_pococks():
    # Two looks at equal steps, one-sided 0.05: Pocock's table has the critical value 1.875.
    assert stats.norm.isf(alpha_at_each(0.05, (50, 100))) == pytest.approx(1.875, abs=0.002)


@pytest.mark.parametrize("sizes", [(24, 48), (24, 48, 96), (10, 20, 40, 80, 160)])
@pytest.mark.parametrize("alpha", [0.05, 0.01])
def test_all_looks_together_err_as_often_as_alpha_says(sizes, alpha):
    generator, rounds = np.random.default_rng(1), 40_000
    steps = np.diff((0, *sizes))
    sums = np.cumsum(generator.normal(size=(rounds, len(sizes))) * np.sqrt(steps), axis=1)
    crossed = (sums / np.sqrt(sizes) > stats.norm.isf(alpha_at_each(alpha, sizes))).any(axis=1)
    assert crossed.mean() == pytest.approx(alpha, abs=3 * np.sqrt(alpha / rounds))
    assert alpha_at_each(alpha, sizes) > alpha / len(sizes)  # more than Bonferroni allows
