"""Is the compressed model worse by more than a margin? Both one-sided questions, on paired scores.

Two kinds of scores, two methods, one answer (`Comparison`), in which larger is worse:

items      right or wrong: an exact test by the items that changed sides (`discordance`).
windows    mean losses, or divergences. Tokens of a window hang together, windows do not: Student's t on the window
           means, weighted by tokens (the ratio estimator's usual variance).
"""

from __future__ import annotations

from dataclasses import dataclass

from scipy import stats

from compress.evaluation.discordance import Flips, flips, lower_bound, p_of_at_least, p_of_at_most, upper_bound
from compress.evaluation.paired import Paired
from compress.evaluation.statistics import weighted_mean


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


def compare(paired: Paired, margin: float, alpha: float) -> Comparison:
    """Compare at a margin (accuracy, or nats) with one-sided bounds of level 1 - alpha. Raises ValueError for fewer
    than two windows, or no item."""
    if paired.unit == "items":
        return _compare_items(flips(paired), margin, alpha)
    return _compare_windows(paired, margin, alpha)


def _compare_items(found: Flips, margin: float, alpha: float) -> Comparison:
    if not found.items:
        raise ValueError("no item to compare by")
    low, high = lower_bound(found, alpha), upper_bound(found, alpha)
    p_within, p_beyond = p_of_at_least(found, margin), p_of_at_most(found, margin)
    # An exact p is not quite monotone in the loss. A margin counts as refuted where every loss beyond it is as well.
    if (p_within < alpha) != (high < margin):
        p_within, high = max(p_within, alpha), max(high, margin)
    if (p_beyond < alpha) != (low > margin):
        p_beyond, low = max(p_beyond, alpha), min(low, margin)
    return Comparison(found.loss, low, high, p_within, p_beyond, found.items)


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
