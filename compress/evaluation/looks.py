"""Looking more than once: how much alpha each look at growing data may use.

A gate that cannot decide on 24 windows may ask for 48, then 96. Each look is another chance to be fooled, so each must
be stricter. The constant boundary (Pocock, Biometrika 64, 1977): the same critical value c at every look, such that

    P(Z_1 > c or ... or Z_K > c) = alpha,    corr(Z_i, Z_j) = sqrt(n_i / n_j)  for n_i <= n_j,

because later looks contain earlier ones. With one look it is the ordinary test; two looks at 24 and 48 windows use
0.0303 each of 0.05. Passing and failing are two tests, each with its own alpha.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
from scipy import optimize, stats

LARGEST = 8
"""Looks at most: doubling eight times is 256 times the data."""


def look_sizes(first: int, most: int) -> tuple[int, ...]:
    """Units at each look: doubled until there are no more. look_sizes(24, 100) = (24, 48, 100)."""
    sizes = [min(first, most)]
    while sizes[-1] < most and len(sizes) < LARGEST:
        sizes.append(min(2 * sizes[-1], most))
    if len(sizes) > 2 and sizes[-1] < 1.25 * sizes[-2]:  # a last look that adds little costs more than it brings
        del sizes[-2]
    return tuple(sizes)


@cache
def alpha_at_each(alpha: float, sizes: tuple[int, ...]) -> float:
    """The alpha that every look may use so that all of them together use `alpha`. `sizes` rise."""
    if len(sizes) == 1:
        return alpha
    units = np.array(sizes, dtype=np.float64)
    correlation = np.sqrt(np.minimum.outer(units, units) / np.maximum.outer(units, units))
    together = stats.multivariate_normal(mean=np.zeros(len(sizes)), cov=correlation, allow_singular=True, seed=0)

    def excess(each: float) -> float:
        bound = float(stats.norm.isf(each))
        return 1 - float(together.cdf(np.full(len(sizes), bound))) - alpha

    # Integration in three and more dimensions is good to about 1e-5; the result is rounded down past that.
    found = float(optimize.brentq(excess, alpha / len(sizes) / 2, alpha, xtol=1e-6))
    return math.floor(found * 1e4) / 1e4 if found > 1e-3 else alpha / len(sizes)
