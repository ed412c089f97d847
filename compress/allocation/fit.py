"""Predicted costs held against measured divergence, so that a prediction is in nats that were seen.

The sum of costs ranks choices well, but its parts are off by kind: attention inputs may cost half of what the second
order says, down projections twice. A factor for each kind of unit, none negative, is fitted to measured divergences:

    measured_i  ~  sum_kind beta_kind  sum_{u of kind} cost[u][k_u]

by least squares of relative errors, so that large divergences do not drown small ones. Costs that were measured
rather than predicted, those of the embedding and the head, keep the factor 1.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats


@dataclass(frozen=True)
class Fit:
    """`r2` and `rank` are of predicted against measured, over the measured choices: R^2 of their logarithms, and
    Spearman's rank correlation; None where all measured choices are alike."""

    factors: dict[str, float]
    r2: float | None
    rank: float | None
    predicted: tuple[float, ...]
    measured: tuple[float, ...]


def by_kind(kinds: Sequence[str], costs: Sequence[float]) -> dict[str, float]:
    """Costs of chosen options summed by kind of unit."""
    sums: dict[str, float] = {kind: 0.0 for kind in kinds}
    for kind, cost in zip(kinds, costs, strict=True):
        sums[kind] += cost
    return sums


def fit(rows: Sequence[dict[str, float]], measured: Sequence[float], exact: Collection[str] = ()) -> Fit:
    """Factors from `rows` (costs by kind of each measured choice) and their divergences in nats, all positive.

    With fewer measurements than kinds one common factor is fitted. `exact` kinds keep the factor 1.
    """
    kinds = [kind for kind in rows[0] if kind not in exact]
    target = np.asarray(measured, float)
    table = np.array([[row[kind] for kind in kinds] for row in rows])
    known_costs = np.array([sum(row[kind] for kind in exact) for row in rows])
    shares = np.clip(1 - known_costs / target, 0, None)
    if len(rows) > len(kinds):
        factors, _ = optimize.nnls(table / target[:, None], shares)
    else:
        totals = table.sum(1) / target
        factors = np.full(len(kinds), float((totals * shares).sum() / max(np.square(totals).sum(), 1e-300)))
    # A kind that the few measured choices say nothing about keeps what the others say, rather than costing nothing.
    known = factors[factors > 0]
    factors = np.where(factors > 0, factors, known.min() if len(known) else 1.0)
    predicted = table @ factors + known_costs
    fitted = {kind: float(factor) for kind, factor in zip(kinds, factors, strict=True)}
    return Fit(
        {kind: fitted.get(kind, 1.0) for kind in rows[0]},
        _r2(predicted, target),
        _rank(predicted, target),
        tuple(map(float, predicted)),
        tuple(map(float, target)),
    )


def _rank(predicted: NDArray[np.float64], measured: NDArray[np.float64]) -> float | None:
    if len(measured) < 3 or np.ptp(predicted) == 0 or np.ptp(measured) == 0:
        return None
    return float(stats.spearmanr(predicted, measured).statistic)


def _r2(predicted: NDArray[np.float64], measured: NDArray[np.float64]) -> float | None:
    """1 - residual / total variance of logarithms."""
    logs = np.log(measured)
    total = float(np.square(logs - logs.mean()).sum())
    found = np.log(np.maximum(predicted, 1e-300))
    return 1 - float(np.square(logs - found).sum()) / total if total > 0 else None
