"""The knapsack: against every choice there is, and at its edges."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from compress.allocation.solver import BudgetError, cheapest


@pytest.mark.parametrize("seed", range(8))
def test_no_choice_within_the_budget_is_cheaper(seed):
    generator = np.random.default_rng(seed)
    sizes = [sorted(generator.integers(10, 2000, 3).tolist()) for _ in range(6)]
    costs = [sorted(generator.random(3).tolist(), reverse=True) for _ in range(6)]
    budget = int(generator.integers(sum(row[0] for row in sizes), sum(row[2] for row in sizes)))
    best = min(
        sum(costs[unit][option] for unit, option in enumerate(choice))
        for choice in itertools.product(range(3), repeat=6)
        if sum(sizes[unit][option] for unit, option in enumerate(choice)) <= budget
    )
    found = cheapest(costs, sizes, budget)
    assert sum(sizes[unit][option] for unit, option in enumerate(found)) <= budget
    assert sum(costs[unit][option] for unit, option in enumerate(found)) == pytest.approx(best, rel=1e-9)


def test_a_budget_is_kept_to_the_byte_where_the_solver_would_round():
    sizes = [[10**10, 2 * 10**10 + 1], [10**10, 2 * 10**10 + 1]]
    assert cheapest([[2.0, 1.0], [2.0, 1.5]], sizes, 3 * 10**10 + 1) == [1, 0]
    assert cheapest([[2.0, 1.0], [2.0, 1.5]], sizes, 3 * 10**10) == [0, 0]


def test_a_larger_option_that_costs_more_is_not_taken_because_it_fits():
    assert cheapest([[1.0, 2.0]], [[5, 10]], 100) == [0]


def test_the_smallest_feasible_budget_is_named():
    with pytest.raises(BudgetError) as error:
        cheapest([[1.0, 0.5], [1.0, 0.5]], [[5, 10], [7, 10]], 11)
    assert error.value.smallest == 12
    assert cheapest([[1.0, 0.5], [1.0, 0.5]], [[5, 10], [7, 10]], 12) == [0, 0]


def test_hundreds_of_units_take_seconds():
    generator = np.random.default_rng(0)
    weights = generator.integers(3 * 10**5, 3 * 10**6, 120)
    sizes = [[int(weight * bits / 8) for bits in (2, 3, 4, 5, 6, 8)] for weight in weights]
    costs = [[float(scale * 4.0**-bits) for bits in (2, 3, 4, 5, 6, 8)] for scale in generator.lognormal(0, 1.5, 120)]
    budget = int(weights.sum() * 4.1 / 8)
    found = cheapest(costs, sizes, budget)
    taken = sum(row[option] for row, option in zip(sizes, found, strict=True))
    assert 0.999 * budget < taken <= budget


def test_costs_that_are_no_numbers_are_refused():
    with pytest.raises(ValueError, match="finite"):
        cheapest([[1.0, float("nan")]], [[1, 2]], 2)


def test_one_very_dear_option_does_not_blur_the_others():
    """Against the same problem without it: HiGHS' tolerances are absolute."""
    chance = np.random.default_rng(5)
    costs = (chance.lognormal(0, 1, (40, 1)) * 1e-6 * 4.0 ** -np.arange(6)).tolist()
    sizes = [[1000 * (2 + k) + at for k in range(6)] for at in range(40)]
    plain = cheapest(costs, sizes, 40 * 4500)
    dear = [[row[0] + 1000.0, *row[1:]] if at == 7 else row for at, row in enumerate(costs)]
    found = cheapest(dear, sizes, 40 * 4500)
    total = sum(row[k] for row, k in zip(dear, found, strict=True))
    assert plain[7] > 0 and total <= 1.001 * sum(row[k] for row, k in zip(costs, plain, strict=True))
