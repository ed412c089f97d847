"""Sums of outer products over rows of 8-bit integers: exact for the rounded rows, close for the rows themselves."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from compress.calibration import integer_rows
from compress.calibration.integer_rows import APART, product, rounded

pytestmark = pytest.mark.skipif(not integer_rows.exact_here(), reason="no exact products of integers on this CPU")


def _random(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _as_rounded(rows):
    """float64 rows that the sums are over, in the order: the rounded ones, those apart."""
    return torch.cat([rows.integers.double() * rows.scale.double(), rows.apart.double()])


@pytest.mark.parametrize("tokens", [0, 1, 2, 3, 33, 1000])
@pytest.mark.parametrize("columns", [1, 2, 5, 17, 193])
def test_a_product_is_that_of_the_rounded_rows_whatever_the_shape(tokens, columns):
    rows, errors = rounded(_random(tokens, columns, seed=0), 0.01 * _random(tokens, 3, seed=1))

    assert len(rows) == tokens
    for left, right in ((rows, rows), (errors, rows), (rows.columns(slice(columns // 2, None)), rows)):
        expected = _as_rounded(left).T @ _as_rounded(right)
        torch.testing.assert_close(product(left, right).double(), expected, rtol=1e-5, atol=1e-5)


def test_an_entry_moves_by_half_a_step_and_a_step_is_a_127th_of_the_largest():
    values = _random(256, 9, seed=2)
    (rows,) = rounded(values)
    kept = rows.integers.abs().amax(1) > 0

    near = rows.integers[kept].float() * rows.scale
    assert float(((near - values[kept]).abs() / rows.scale).max()) <= 0.5 + 1e-4
    assert torch.equal(rows.integers.abs().amax(0), torch.full((9,), 127))
    assert len(rows.apart) == 256 // APART == int((~kept).sum())


def test_a_few_tokens_of_huge_activations_cost_the_others_no_digits():
    values = _random(512, 24, seed=3)
    huge = torch.tensor([5, 99, 300])
    values[huge, 7] = 4000.0
    (rows,) = rounded(values)

    rest = [token for token in range(512) if token not in huge.tolist()]
    assert float(rows.scale[7]) <= float(values[rest, 7].abs().max()) / 127 * (1 + 1e-6)
    exact = values.double().T @ values.double()
    others = [column for column in range(24) if column != 7]
    error = (product(rows, rows).double() - exact)[others][:, others]
    assert float(error.norm() / exact[others][:, others].norm()) < 0.005


def test_no_direction_becomes_negative_where_rows_are_nearly_dependent():
    """A common mean a hundred times as large as what differs, and fewer directions than columns: what rounded sums do
    not survive."""
    mean, mix = 30 * _random(1, 48, seed=4), _random(12, 48, seed=5)
    batches = [mean + 0.3 * _random(1024, 12, seed=seed) @ mix for seed in range(6, 14)]
    whole, halves = torch.zeros(48, 48, dtype=torch.float64), torch.zeros(48, 48, dtype=torch.float64)
    for batch in batches:
        (rows,) = rounded(batch)
        whole += product(rows, rows).double()
        halves += (batch.bfloat16().T @ batch.bfloat16()).double()
    exact = sum(batch.double().T @ batch.double() for batch in batches)

    smallest, largest = float(torch.linalg.eigvalsh(whole)[0]), float(torch.linalg.eigvalsh(exact)[-1])
    assert smallest > -1e-6 * largest
    assert float(torch.linalg.eigvalsh(halves)[0]) < 10 * smallest - 1e-5 * largest


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_seen(value):
    values = _random(200, 6, seed=14)
    values[17, 2] = value
    (rows,) = rounded(values)
    found = product(rows, rows)

    assert not found[2].isfinite().any()
    assert found[[0, 1, 3, 4, 5]][:, [0, 1, 3, 4, 5]].isfinite().all()


def test_more_tokens_than_32_bits_hold_are_summed_in_pieces(monkeypatch):
    (rows,) = rounded(_random(107, 9, seed=16))
    at_once = product(rows, rows)
    monkeypatch.setattr(integer_rows, "_EXACT_TOKENS", 10)

    torch.testing.assert_close(product(rows, rows), at_once, rtol=1e-5, atol=1e-5)
    assert integer_rows.LARGEST**2 * 133_144 < 2**31 <= integer_rows.LARGEST**2 * 133_145


OLDER = """
import torch
from compress.calibration import integer_rows
from compress.calibration.statistics import InputStatistics, facts_of_products
rows = 3 + 0.3 * torch.randn(1, 1024, 40, generator=torch.Generator().manual_seed(0))
statistics = InputStatistics(40, torch.device("cpu"), torch.bfloat16)
statistics.add(rows, None)
exact = rows[0].double().T @ rows[0].double() / 1024
facts = facts_of_products(torch.bfloat16, torch.device("cpu"))
close = float((statistics.hessian()[0] - exact).norm() / exact.norm()) < 1e-5
print(integer_rows.exact_here(), close, *facts.values())
"""


def test_where_integers_run_over_sums_are_in_float32():
    """oneDNN as on a processor without VNNI, which adds pairs of products up in 16 bits."""
    older = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    ended = subprocess.run([sys.executable, "-c", OLDER], env=older, capture_output=True, text=True, check=False)

    assert ended.stdout.split() == ["False", "True", "bfloat16", "float32"], ended.stderr


def test_a_column_of_zeros_stays_zero():
    values = _random(40, 4, seed=15)
    values[:, 1] = 0
    (rows,) = rounded(values)

    assert not product(rows, rows)[1].any()
