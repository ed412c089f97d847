"""The cheapest choice within a number of bytes: a multiple-choice knapsack, solved exactly by HiGHS (in scipy).

minimise   sum_u cost[u][k_u]      over one option k_u for every unit u
subject to sum_u bytes[u][k_u] <= budget
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

SECONDS = 60.0
"""After which the best choice found so far is taken; a few hundred units take well under one."""


class BudgetError(ValueError):
    """No choice is small enough. `smallest`: bytes of the smallest one."""

    def __init__(self, smallest: int) -> None:
        super().__init__(f"the smallest choice takes {smallest:,} bytes")
        self.smallest = smallest


def cheapest(costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], budget: int) -> list[int]:
    """The option of each unit. costs in any unit, sizes in bytes; units may have different numbers of options.

    Raises BudgetError where not even the smallest options fit, ValueError for costs that are not finite.
    """
    if not all(np.isfinite(cost) for row in costs for cost in row):
        raise ValueError("costs must be finite")
    smallest = sum(min(row) for row in sizes)
    if smallest > budget:
        raise BudgetError(smallest)
    if sum(max(row) for row in sizes) <= budget:
        return [int(np.argmin(row)) for row in costs]
    cost = np.concatenate([np.asarray(row, float) for row in costs])
    cost = cost - np.repeat([min(row) for row in costs], [len(row) for row in costs])
    size = np.concatenate([np.asarray(row, float) for row in sizes])
    owner = np.repeat(np.arange(len(costs)), [len(row) for row in costs])
    one_each = sparse.csr_array((np.ones(len(owner)), (owner, np.arange(len(owner)))))
    first = np.searchsorted(owner, np.arange(len(costs)))
    taken = _solved(cost, size, one_each, budget, smallest)
    # The solver's tolerances are absolute: beside one very dear option, small differences are nothing to it. No option
    # that alone costs more than a choice that was found is part of the cheapest one, so it may cost as little as that.
    while (total := float(cost[taken].sum())) < 0.5 * float(cost.max()):
        cost = np.minimum(cost, total)
        again = _solved(cost, size, one_each, budget, smallest)
        if float(cost[again].sum()) >= total * (1 - 1e-9):
            break
        taken = again
    return [int(option) for option in taken - first]


def _solved(
    cost: NDArray[np.float64], size: NDArray[np.float64], one_each: sparse.csr_array, budget: int, smallest: int
) -> NDArray[np.int64]:
    """Numbers of the options taken, one a unit."""
    allowed = float(budget)
    while True:
        # In shares of the budget, so that the solver's tolerance (1e-6) is relative; what it lets through is taken off.
        found = milp(
            cost / max(float(np.abs(cost).max()), 1e-300),
            constraints=[
                LinearConstraint(one_each, 1, 1),
                LinearConstraint(sparse.csr_array(size[None, :] / budget), -np.inf, allowed / budget),
            ],
            integrality=np.ones(len(cost), dtype=np.int64),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": 1e-9, "time_limit": SECONDS},
        )
        if found.x is None:
            raise BudgetError(smallest)
        taken = np.flatnonzero(found.x > 0.5)
        excess = float(size[taken].sum()) - budget
        if excess <= 0:
            return taken
        allowed -= excess
