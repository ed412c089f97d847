"""Factors by kind: found again where they made the data, and never nothing."""

from __future__ import annotations

import numpy as np
import pytest

from compress.allocation.fit import by_kind, fit


def test_the_factors_that_made_the_data_are_found():
    generator = np.random.default_rng(0)
    rows = [{"qkv": a, "down": b} for a, b in generator.random((8, 2))]
    measured = [0.5 * row["qkv"] + 2 * row["down"] for row in rows]
    found = fit(rows, measured)
    assert found.factors == pytest.approx({"qkv": 0.5, "down": 2})
    assert found.r2 == pytest.approx(1) and found.rank == pytest.approx(1)


def test_a_kind_that_nothing_is_known_of_does_not_become_free():
    rows = [{"qkv": a, "down": 0.0} for a in (0.1, 0.2, 0.4)]
    assert fit(rows, [0.2, 0.4, 0.8]).factors["down"] == pytest.approx(2)


def test_two_measurements_of_four_kinds_give_one_factor():
    rows = [{"a": 1.0, "b": 1.0, "c": 1.0, "d": 1.0}, {"a": 2.0, "b": 2.0, "c": 2.0, "d": 2.0}]
    assert set(fit(rows, [8.0, 16.0]).factors.values()) == {2.0}


def test_costs_are_summed_by_kind():
    assert by_kind(["a", "b", "a"], [1.0, 2.0, 3.0]) == {"a": 4.0, "b": 2.0}
