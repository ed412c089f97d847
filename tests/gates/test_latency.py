"""A bound on time is judged by its interval."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from compress.gates import Facts, LatencyGate

DECODE, PREFILL = "latency.decode_seconds", "latency.prefill_seconds"
FACTS = Facts(
    source={DECODE: 0.010, PREFILL: 0.20},
    compressed={DECODE: 0.011, PREFILL: 0.21},
    intervals={DECODE: (0.0105, 0.0115), PREFILL: (0.20, 0.22)},
    ratio_intervals={DECODE: (1.05, 1.15)},
)


@pytest.mark.parametrize(
    ("fields", "verdict"),
    [
        ({"max_ratio": 1.2}, "passed"),
        ({"max_ratio": 1.0}, "failed"),
        ({"max_ratio": 1.1}, "inconclusive"),
        ({"max_seconds": 0.012}, "passed"),
        ({"max_seconds": 0.0102}, "failed"),
        ({"max_seconds": 0.011}, "inconclusive"),
        ({"what": "prefill", "max_seconds": 0.3}, "passed"),
        ({"what": "prefill", "max_ratio": 1.2}, "failed"),  # its ratio was not measured
    ],
)
def test_all_of_the_interval_decides(fields, verdict):
    assert LatencyGate(**fields).judge(FACTS).verdict == verdict


@pytest.mark.parametrize(
    "fields", [{}, {"max_seconds": 1, "max_ratio": 1}, {"max_ratio": 0}, {"max_ratio": float("inf")}]
)
def test_bounds_that_judge_nothing_are_refused(fields):
    with pytest.raises(ValidationError):
        LatencyGate(**fields)
