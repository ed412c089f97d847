"""Intervals from window means: tokens of a window are not independent, windows nearly are; a window is one sample."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

Interval = tuple[float, float]


def weighted_mean(means: NDArray[np.float64], weights: NDArray[np.float64]) -> tuple[float, float]:
    """The ratio estimator sum(w m) / sum(w) over at least two units, and its usual standard error."""
    units, total = len(means), float(weights.sum())
    mean = float((means * weights).sum()) / total
    spread = float(((weights * (means - mean)) ** 2).sum()) * units / (units - 1)
    return mean, math.sqrt(spread) / total


def mean_interval(means: Tensor, counts: Tensor, confidence: float = 0.95) -> tuple[float, Interval]:
    """Token-weighted mean of window means and its interval by Student's t.

    means, counts: (windows,) the mean over a window's tokens, and how many tokens that was. One window has no interval.
    """
    windows = len(means)
    if windows < 2:
        return float(means.double().mean()), (-math.inf, math.inf)
    mean, error = weighted_mean(means.double().numpy(), counts.double().numpy())
    reach = float(stats.t.ppf(0.5 + confidence / 2, windows - 1)) * error
    return mean, (mean - reach, mean + reach)
