"""The shift is the ridge solution of the equation it comes from, whatever is computed together; failures are None."""

from __future__ import annotations

import pytest
import torch

from compress.quantization import target_shift
from compress.quantization.target_shift import Mismatch, cholesky_, shift_of, targets_of


def _mismatch(columns=40, hidden=12, tokens=300, residual=True):
    generator = torch.Generator().manual_seed(columns)
    x, error, beside = (
        torch.randn(tokens, width, generator=generator, dtype=torch.float64) for width in (columns, columns, hidden)
    )
    cross, offset = error.T @ x / tokens, beside.T @ x / tokens
    return Mismatch(x.T @ x / tokens, cross, offset if residual else None, tokens)


@pytest.mark.parametrize("rows_at_once", [512, 7])
def test_the_shift_solves_the_ridge_equation(rows_at_once, monkeypatch):
    monkeypatch.setattr(target_shift, "ROWS_AT_ONCE", rows_at_once)
    given, used = _mismatch(), _mismatch()
    shift = shift_of(used, 0.5, 0.25, ridge=0.1)

    damped = given.hessian + 0.1 * given.hessian.diagonal().mean() * torch.eye(40, dtype=torch.float64)
    torch.testing.assert_close(shift.factor.double() @ damped, 0.5 * given.cross, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(shift.offset.double() @ damped, 0.25 * given.residual, rtol=1e-4, atol=1e-6)
    weight = torch.randn(3, 40, generator=torch.Generator().manual_seed(1))
    assert shift_of(_mismatch(), 0.5, 0.0).offset is None
    moved = weight + weight @ shift_of(_mismatch(residual=False), 0.5, 0.25).factor
    torch.testing.assert_close(shift_of(_mismatch(residual=False), 0.5, 0.25).target(weight), moved)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("rows", [(12,), (3, 9), (12, 30)])
def test_targets_of_all_linears_are_those_of_each(rows, residual, monkeypatch):
    """Fewer rows than the 40 columns: their own moments are divided; more: D is. R has 12 rows."""
    monkeypatch.setattr(target_shift, "PANEL", 16)
    residual = residual and rows == (12,)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(count, 40, generator=generator) for count in rows]

    found = targets_of(_mismatch(residual=residual), weights, 0.5, 0.25)

    shift = shift_of(_mismatch(residual=residual), 0.5, 0.25)
    for weight, target in zip(weights, found, strict=True):
        torch.testing.assert_close(target, shift.target(weight), rtol=1e-5, atol=1e-6)
    bad = _mismatch()
    bad.cross[0, 0] = float("nan")
    assert targets_of(bad, weights, 0.5, 0.25) is None


def test_the_example_of_the_docstring():
    one = torch.tensor([[1.0]], dtype=torch.float64)
    shift = shift_of(Mismatch(one.clone(), 0.1 * one, 0.05 * one, 4), 1.0, 1.0, ridge=0.0)

    assert float(shift.target(torch.tensor([[2.0]]))) == pytest.approx(2.25)


@pytest.mark.parametrize("where", ["hessian", "cross", "residual"])
def test_sums_that_are_not_finite_give_no_shift(where):
    mismatch = _mismatch()
    getattr(mismatch, where)[0, 0] = float("inf")

    assert shift_of(mismatch, 0.5, 0.5) is None


def test_the_factor_is_made_in_the_memory_of_the_matrix():
    matrix = _mismatch().hessian
    expected = torch.linalg.cholesky(matrix)

    lower = cholesky_(matrix)

    # LAPACK's blocks may round the last bit otherwise where a matrix lies elsewhere in memory (seen on AMD EPYC).
    torch.testing.assert_close(lower, expected, rtol=1e-13, atol=1e-15)
    assert lower.data_ptr() == matrix.data_ptr()
    assert cholesky_(-torch.eye(3, dtype=torch.float64)) is None


def test_full_shares_without_a_ridge_are_the_least_squares_answer():
    """No other matrix maps x closer to W x~ + (r~ - r)."""
    generator = torch.Generator().manual_seed(0)
    x, error = (torch.randn(200, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    beside = torch.randn(200, 3, generator=generator, dtype=torch.float64)
    weight = torch.randn(3, 6, generator=generator)
    mismatch = Mismatch(x.T @ x / 200, error.T @ x / 200, beside.T @ x / 200, 200)

    target = shift_of(mismatch, alpha=1, beta=1, ridge=0).target(weight)

    expected = torch.linalg.lstsq(x, (x + error) @ weight.double().T + beside).solution.T
    torch.testing.assert_close(target.double(), expected, rtol=1e-4, atol=1e-5)
