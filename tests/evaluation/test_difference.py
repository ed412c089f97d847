"""Paired comparisons: against brute force, against each other, and by how often they err."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from compress.evaluation.difference import compare
from compress.evaluation.discordance import Flips, flips, mcnemar, p_of_at_least, p_of_at_most, tango_z
from compress.evaluation.paired import Paired


def items(lost: int, won: int, both: int, neither: int = 0) -> Paired:
    source = [1] * (lost + both) + [0] * (won + neither)
    compressed = [0] * lost + [1] * (both + won) + [0] * neither
    ids = tuple(map(str, range(len(source))))
    return Paired("items", ids, np.array(source, float), np.array(compressed, float), np.ones(len(source)))


def windows(losses: list[float], source: list[float] | None = None, weights: list[float] | None = None) -> Paired:
    ids = tuple(map(str, range(len(losses))))
    base = np.zeros(len(losses)) if source is None else np.array(source)
    return Paired(
        "windows", ids, base, np.array(losses), np.ones(len(losses)) if weights is None else np.array(weights)
    )


def likeliest_share(found: Flips, loss: float) -> float:
    """The share won that makes the counts likeliest when `loss` more is lost, by searching."""

    def surprise(share: float) -> float:
        kept = found.items - found.lost - found.gained
        chances = (share + loss, share, 1 - 2 * share - loss)
        return -sum(
            n * math.log(max(p, 1e-300)) for n, p in zip((found.lost, found.gained, kept), chances, strict=True)
        )

    low, high = max(0.0, -loss), (1 - loss) / 2
    return float(optimize.minimize_scalar(surprise, bounds=(low, high), method="bounded", options={"xatol": 1e-12}).x)


@pytest.mark.parametrize("counts", [(6, 2, 100), (0, 3, 40), (10, 10, 60), (25, 5, 200), (1, 0, 20)])
@pytest.mark.parametrize("loss", [-0.2, -0.03, 0.01, 0.1, 0.3])
def test_tangos_statistic_uses_the_likeliest_model_with_that_loss(counts, loss):
    found = Flips(*counts)
    share = likeliest_share(found, loss)
    variance = found.items * (2 * share + loss * (1 - loss))
    expected = (found.lost - found.gained - found.items * loss) / math.sqrt(variance)
    assert tango_z(found, loss) == pytest.approx(expected, rel=1e-4)


def test_without_a_margin_tangos_statistic_is_mcnemars():
    assert tango_z(Flips(6, 2, 100), 0.0) == pytest.approx(4 / math.sqrt(8))


def test_mcnemar_is_the_binomial_tail():
    assert mcnemar(Flips(5, 1, 50)) == pytest.approx((6 + 1) / 64)
    assert mcnemar(Flips(0, 0, 50)) == 1.0


@settings(deadline=None)
@given(st.integers(0, 30), st.integers(0, 30), st.integers(0, 100), st.sampled_from([0.01, 0.05, 0.2]))
def test_bounds_hold_the_loss_and_mirror_when_the_models_are_swapped(lost, won, both, alpha):
    paired = items(lost, won, both, neither=1)
    forward = compare(paired, 0.02, alpha)
    backward = compare(items(won, lost, both, neither=1), 0.02, alpha)
    assert -1 <= forward.low <= forward.loss + 1e-9 and forward.loss - 1e-9 <= forward.high <= 1
    assert forward.low == pytest.approx(-backward.high, abs=1e-6)


@settings(deadline=None)
@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 200), st.floats(0.001, 0.3))
def test_the_bound_and_the_p_value_agree(lost, won, both, margin):
    found = compare(items(lost, won, both, neither=1), margin, 0.05)
    if abs(found.high - margin) > 1e-6:
        assert (found.high < margin) == (found.p_within < 0.05)
    if abs(found.low - margin) > 1e-6:
        assert (found.low > margin) == (found.p_beyond < 0.05)


def test_no_flips_at_all_still_leave_room_for_a_loss():
    found = compare(items(0, 0, 50), 0.02, 0.05)
    assert found.loss == 0 and 0.02 < found.high < 0.1


def test_windows_are_compared_by_students_t_when_they_weigh_alike():
    losses = [0.10, 0.12, 0.08, 0.11, 0.09]
    found = compare(windows(losses), 0.12, 0.05)
    expected = stats.ttest_1samp(losses, 0.12, alternative="less").pvalue
    assert found.p_within == pytest.approx(expected) and found.p_beyond == pytest.approx(1 - expected)


def test_heavier_windows_count_for_more():
    assert compare(windows([0.0, 1.0], weights=[3.0, 1.0]), 0.1, 0.05).loss == pytest.approx(0.25)


def test_windows_that_all_agree_leave_no_doubt():
    found = compare(windows([0.5] * 4, source=[0.4] * 4), 0.2, 0.05)
    assert found.low == found.high == pytest.approx(0.1)
    assert (found.p_within, found.p_beyond) == (0.0, 1.0)


@pytest.mark.parametrize("paired", [windows([0.1]), items(0, 0, 0)])
def test_too_few_units_are_refused(paired):
    with pytest.raises(ValueError):
        compare(paired, 0.1, 0.05)


def outcomes(items: int, share: float, loss: float) -> list[tuple[Flips, float]]:
    """Every count of flips of a few items, and how likely it is."""
    chances = (share + loss, share, 1 - 2 * share - loss)
    return [
        (
            Flips(lost, gained, items),
            float(stats.multinomial.pmf((lost, gained, items - lost - gained), items, chances)),
        )
        for lost in range(items + 1)
        for gained in range(items + 1 - lost)
    ]


@pytest.mark.parametrize("items", [20, 32])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.05, 0.2])
@pytest.mark.parametrize("loss", [0.02, 0.1])
@pytest.mark.parametrize("alpha", [0.05, 0.2])
def test_neither_test_errs_more_often_than_alpha(items, share, loss, alpha):
    """Summed over every outcome, not drawn: exact, also where hardly anything flips."""
    counted = outcomes(items, share, loss)
    assert sum(chance for _, chance in counted) == pytest.approx(1)
    assert sum(chance for found, chance in counted if p_of_at_most(found, loss) < alpha) <= alpha
    assert sum(chance for found, chance in counted if p_of_at_least(found, loss) < alpha) <= alpha


def test_the_sum_is_that_over_all_outcomes_as_extreme():
    found, items, loss = Flips(7, 1, 30), 30, 0.05
    threshold = tango_z(found, loss)
    expected = max(
        sum(chance for each, chance in outcomes(items, share, loss) if tango_z(each, loss) >= threshold - 1e-9)
        for share in np.linspace(0.001, 0.24, 60)
    )
    assert p_of_at_most(found, loss) == pytest.approx(expected, abs=2e-3)


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(0, 300), st.integers(0, 300), st.floats(-0.9, 0.9))
def test_more_lost_items_never_count_for_less(items, lost, gained, loss):
    """What makes the outcomes as extreme an upper tail of the lost, given the gained."""
    if lost + gained < items:
        assert tango_z(Flips(lost + 1, gained, items), loss) >= tango_z(Flips(lost, gained, items), loss) - 1e-9


def test_where_many_items_flip_it_joins_the_normal_test():
    found = Flips(240, 160, 4000)
    assert p_of_at_most(found, 0.015) == pytest.approx(float(stats.norm.sf(tango_z(found, 0.015))), abs=0.01)


def test_flips_count_both_directions():
    assert flips(items(3, 2, 10, 5)) == Flips(3, 2, 20)
