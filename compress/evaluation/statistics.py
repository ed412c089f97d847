"""Intervals from window means: tokens of a window are not independent, windows nearly are; a window is one sample."""

from __future__ import annotations

import math

from scipy import stats
from torch import Tensor

Interval = tuple[float, float]


def mean_interval(means: Tensor, counts: Tensor, confidence: float = 0.95) -> tuple[float, Interval]:
    """Token-weighted mean of window means and its interval by Student's t.

    means, counts: (windows,) the mean over a window's tokens, and how many tokens that was. With windows of unequal
    length this is the ratio estimator sum(n m) / sum(n) with its usual standard error.
    """
    means, counts = means.double(), counts.double()
    windows, total = len(means), float(counts.sum())
    mean = float((means * counts).sum()) / total
    if windows < 2:
        return mean, (-math.inf, math.inf)
    spread = float(((counts * (means - mean)) ** 2).sum()) * windows / (windows - 1)
    reach = float(stats.t.ppf(0.5 + confidence / 2, windows - 1)) * math.sqrt(spread) / total
    return mean, (mean - reach, mean + reach)
