"""Right and wrong answers of two models to the same items: flips, McNemar's test, and an exact test at a margin.

With n items, b right only in the source and c only in the compressed model, the loss of accuracy is (b - c) / n.
Tango's score statistic (Statistics in Medicine 17, 1998, 891-908) of the hypothesis that the true loss is d is

    z(d) = (b - c - n d) / sqrt(n (2 q + d - d^2)),     q = (sqrt(B^2 - 4 A C) - B) / (2 A),
    A = 2 n,   B = -b - c + (2 n - b + c) d,   C = -c d (1 - d),

q being the likeliest share of items that only the compressed model gets right, given d. It orders the outcomes; how
likely they are is not read from the normal distribution, which is coarse where few items flip, but summed: (b, c) is
trinomial with shares (q + d, q), and

    p = max over q of P(z >= the observed one) + GAMMA,     q in its 1 - GAMMA interval given c,

which holds its level at every n (Berger and Boos, Journal of the American Statistical Association 89, 1994, 1012-1016).

Example: n = 200, b = 9, c = 1, d = 0.02: z = 1.41; the normal tail is 0.079, the exact p 0.115.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

from compress.evaluation.paired import Paired

GAMMA = 0.0001
"""Chance that the interval of q misses it; added to every p-value."""
SHARES = 33
"""Values of q that are tried, evenly spaced in its square root."""
REACH = 8.0
"""Standard deviations to each side beyond which outcomes are left out of the sum: less than 1e-14 in all."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Flips:
    """Items answered right by one model only."""

    lost: int
    """Right in the source, wrong in the compressed model: b."""
    gained: int
    """The other way round: c."""
    items: int

    @property
    def loss(self) -> float:
        """Of accuracy, as a difference."""
        return (self.lost - self.gained) / self.items

    @property
    def swapped(self) -> Flips:
        return Flips(self.gained, self.lost, self.items)


def flips(paired: Paired) -> Flips:
    """Discordant items of 0/1 scores."""
    lost = int(np.sum(paired.source > paired.compressed))
    gained = int(np.sum(paired.source < paired.compressed))
    return Flips(lost, gained, len(paired))


def mcnemar(found: Flips) -> float:
    """Exact one-sided p-value of "the compressed model is no worse": P(Bin(b + c, 1/2) >= b). 1 without discordant
    items."""
    discordant = found.lost + found.gained
    return float(stats.binomtest(found.lost, discordant, 0.5, "greater").pvalue) if discordant else 1.0


def tango_z(found: Flips, loss: float) -> float:
    """Tango's score statistic of the hypothesis that accuracy fell by `loss` (-1 < loss < 1); it falls with `loss`."""
    return float(_scores(np.float64(found.lost), np.float64(found.gained), found.items, loss))


def p_of_at_most(found: Flips, loss: float) -> float:
    """p-value of "accuracy fell by `loss` or less": small where it surely fell by more. -1 < loss < 1."""
    return _tail(found.lost, found.gained, found.items, loss)


def p_of_at_least(found: Flips, loss: float) -> float:
    """p-value of "accuracy fell by `loss` or more": the same question with the models changed over."""
    return p_of_at_most(found.swapped, -loss)


def lower_bound(found: Flips, alpha: float) -> float:
    """One-sided 1 - alpha bound: the smallest loss that is not refuted. -1 where none is."""
    edge = -1 + 1e-9
    if p_of_at_most(found, edge) >= alpha:
        return -1.0

    def gap(loss: float) -> float:
        return p_of_at_most(found, loss) - alpha

    # At the observed loss about half of the outcomes are as large, so the bound lies below.
    high = min(found.loss, 1 - 1e-9)
    return float(optimize.brentq(gap, edge, high, xtol=1e-7)) if gap(high) > 0 else high


def upper_bound(found: Flips, alpha: float) -> float:
    """One-sided 1 - alpha bound: the largest loss that is not refuted."""
    return -lower_bound(found.swapped, alpha)


def _scores(lost: Array | np.float64, gained: Array | np.float64, items: int, loss: float) -> Array:
    """Tango's statistic of counts that broadcast together."""
    a = 2 * items
    b = -lost - gained + (2 * items - lost + gained) * loss
    c = -gained * loss * (1 - loss)
    share = (np.sqrt(np.maximum(b * b - 4 * a * c, 0.0)) - b) / (2 * a)
    variance = items * (2 * share + loss * (1 - loss))
    distance = np.asarray(lost - gained - items * loss)
    # Where no model is consistent with the loss but a certain one, the variance is 0 and the sign decides.
    with np.errstate(divide="ignore", invalid="ignore"):
        scores = np.where(variance > 0, distance / np.sqrt(variance), np.copysign(np.inf, distance))
    return np.where(distance == 0, 0.0, scores)


@lru_cache(maxsize=4096)
def _tail(lost: int, gained: int, items: int, loss: float) -> float:
    """max over q of P(z >= that of the counts | q, loss) + GAMMA."""
    shares = _plausible_shares(gained, items, loss)
    columns = _plausible_counts(shares, items)
    rows = _plausible_counts(np.clip(shares + loss, 0, 1), items)
    observed = tango_z(Flips(lost, gained, items), loss)
    as_large = _scores(rows[:, None], columns[None, :], items, loss) >= observed - 1e-9
    # z rises with b, so that the outcomes as large as the observed one are those from a smallest b on, given c.
    smallest = np.where(as_large.any(axis=0), rows[as_large.argmax(axis=0)], rows[-1] + 1)
    chance_of_gained: Array = np.asarray(stats.binom.pmf(columns[None, :], items, shares[:, None]))
    given = np.clip((shares + loss) / np.maximum(1 - shares, 1e-300), 0, 1)
    chance_of_lost: Array = np.asarray(stats.binom.sf(smallest[None, :] - 1, items - columns[None, :], given[:, None]))
    return min(1.0, float((chance_of_gained * chance_of_lost).sum(axis=1).max()) + GAMMA)


def _plausible_shares(gained: int, items: int, loss: float) -> Array:
    """Values of q in its Clopper-Pearson interval given c that the loss allows: q + loss >= 0, 2 q + loss <= 1."""
    found = stats.binomtest(gained, items).proportion_ci(1 - GAMMA, method="exact")
    lowest, highest = max(0.0, -loss), (1 - loss) / 2
    low, high = min(max(found.low, lowest), highest), max(min(found.high, highest), lowest)
    return np.linspace(math.sqrt(low), math.sqrt(high), SHARES) ** 2


def _plausible_counts(shares: Array, items: int) -> Array:
    """Whole numbers that a count with any of these shares can reasonably be."""
    low, high = float(shares.min()), float(shares.max())
    first = items * low - REACH * math.sqrt(items * low * (1 - low)) - REACH
    last = items * high + REACH * math.sqrt(items * high * (1 - high)) + REACH
    return np.arange(max(0, math.floor(first)), min(items, math.ceil(last)) + 1, dtype=np.float64)
