"""Is the compressed model worse by more than a margin? Both one-sided questions, on paired scores.

Two kinds of scores, two methods, one answer (`Comparison`), in which larger is worse:

items      right or wrong. With n items, b right only in the source and c only in the compressed model, the loss of
           accuracy is (b - c) / n. Its score interval is Tango's (Statistics in Medicine 17, 1998, 891-908): the
           margins d that are not rejected by

               z(d) = (b - c - n d) / sqrt(n (2 q + d - d^2)),     q = (sqrt(B^2 - 4 A C) - B) / (2 A),
               A = 2 n,   B = -b - c + (2 n - b + c) d,   C = -c d (1 - d),

           q being the likeliest share of items that only the compressed model gets right, given d. Unlike Wald's it
           keeps its level with few discordant items, and none at all.
windows    mean losses, or divergences. Tokens of a window hang together, windows do not: Student's t on the window
           means, weighted by tokens (the ratio estimator's usual variance).

Example: n = 100, b = 6, c = 2 (8 discordant items): the loss is 0.04, and z(0) = 4 / sqrt(8) = 1.41.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats

from compress.evaluation.paired import Paired
from compress.evaluation.statistics import weighted_mean


@dataclass(frozen=True)
class Flips:
    """Items answered right by one model only."""

    lost: int
    """Right in the source, wrong in the compressed model: b."""
    gained: int
    """The other way round: c."""
    items: int


@dataclass(frozen=True)
class Comparison:
    """How much worse the compressed model is: a difference of accuracies, or of mean losses in nats."""

    loss: float
    low: float
    """Lower one-sided 1 - alpha bound of `loss`."""
    high: float
    p_within: float
    """Small where the loss is surely below the margin."""
    p_beyond: float
    """Small where it is surely above."""
    units: int


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


def compare(paired: Paired, margin: float, alpha: float) -> Comparison:
    """Compare at a margin (accuracy, or nats) with one-sided bounds of level 1 - alpha. Raises ValueError for fewer
    than two windows, or no item."""
    if paired.unit == "items":
        return _compare_items(flips(paired), margin, alpha)
    return _compare_windows(paired, margin, alpha)


def _compare_items(found: Flips, margin: float, alpha: float) -> Comparison:
    if not found.items:
        raise ValueError("no item to compare by")
    reach = float(stats.norm.ppf(1 - alpha))
    z = tango_z(found, margin)
    return Comparison(
        loss=(found.lost - found.gained) / found.items,
        low=_bound(found, reach, -1.0),
        high=_bound(found, -reach, 1.0),
        p_within=float(stats.norm.cdf(z)),
        p_beyond=float(stats.norm.sf(z)),
        units=found.items,
    )


def tango_z(found: Flips, loss: float) -> float:
    """Tango's score statistic of the hypothesis that accuracy fell by `loss` (-1 < loss < 1); it falls with `loss`."""
    items, lost, gained = found.items, found.lost, found.gained
    # Where no model is consistent with the loss but a certain one, the variance is 0 and the sign decides.
    a = 2 * items
    b = -lost - gained + (2 * items - lost + gained) * loss
    c = -gained * loss * (1 - loss)
    share = (math.sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)
    variance = items * (2 * share + loss * (1 - loss))
    distance = lost - gained - items * loss
    if variance <= 0:
        return 0.0 if distance == 0 else math.copysign(math.inf, distance)
    return distance / math.sqrt(variance)


def _bound(found: Flips, reach: float, end: float) -> float:
    """The loss between the observed one and `end` at which z is `reach`; `end` itself where z never gets there."""
    observed = (found.lost - found.gained) / found.items
    near_end = end * (1 - 1e-9)

    def gap(loss: float) -> float:
        return tango_z(found, loss) - reach

    if observed == end or gap(observed) * gap(near_end) > 0:
        return end
    return float(optimize.brentq(gap, observed, near_end, xtol=1e-10))


def _compare_windows(paired: Paired, margin: float, alpha: float) -> Comparison:
    windows = len(paired)
    if windows < 2:
        raise ValueError(f"{windows} window: without a second one there is no spread to judge by")
    loss, error = weighted_mean(paired.compressed - paired.source, paired.weights)
    if error == 0:
        certain = float(loss > margin)
        return Comparison(loss, loss, loss, certain, 1 - certain, windows)
    t = stats.t(windows - 1)
    reach = float(t.ppf(1 - alpha)) * error
    statistic = (loss - margin) / error
    return Comparison(loss, loss - reach, loss + reach, float(t.cdf(statistic)), float(t.sf(statistic)), windows)
