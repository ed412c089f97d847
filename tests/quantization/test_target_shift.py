"""The target shift is the ridge regression it says it is."""

from __future__ import annotations

import torch

from compress.quantization.target_shift import Mismatch, shift_of


def _mismatch(tokens=200, columns=6, hidden=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, error = (torch.randn(tokens, columns, generator=generator, dtype=torch.float64) for _ in range(2))
    beside = torch.randn(tokens, hidden, generator=generator, dtype=torch.float64)
    mismatch = Mismatch(x.T @ x / tokens, error.T @ x / tokens, beside.T @ x / tokens, tokens)
    return mismatch, x, x + error, beside


def test_the_example_of_the_docstring():
    one = torch.ones(1, 1, dtype=torch.float64)
    mismatch = Mismatch(one, 0.1 * one, 0.05 * one, 8)

    shift = shift_of(mismatch, alpha=1, beta=1, ridge=0)

    torch.testing.assert_close(shift.target(torch.tensor([[2.0]])), torch.tensor([[2.25]]))
    torch.testing.assert_close(shift_of(mismatch, 1, 0, 0).target(torch.tensor([[2.0]])), torch.tensor([[2.2]]))


def test_full_shares_without_a_ridge_are_the_least_squares_answer():
    """No other matrix maps x closer to W x~ + (r~ - r)."""
    mismatch, x, reference, beside = _mismatch()
    weight = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))

    target = shift_of(mismatch, alpha=1, beta=1, ridge=0).target(weight)

    wanted = reference @ weight.double().T + beside
    expected = torch.linalg.lstsq(x, wanted).solution.T
    torch.testing.assert_close(target.double(), expected, rtol=1e-4, atol=1e-5)


def test_shares_scale_the_step_and_a_ridge_shortens_it():
    mismatch, *_ = _mismatch()
    weight = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    full, half, ridged = (
        shift_of(mismatch, share, share, ridge).target(weight) - weight
        for share, ridge in ((1, 0.1), (0.5, 0.1), (1, 10))
    )

    torch.testing.assert_close(half, full / 2, rtol=1e-4, atol=1e-6)
    assert float(ridged.norm()) < 0.5 * float(full.norm())


def test_no_shift_without_a_factor():
    zeros = torch.zeros(2, 2, dtype=torch.float64)
    assert shift_of(Mismatch(zeros, zeros, None, 8), 1, 1) is None
    broken = torch.full((2, 2), torch.nan, dtype=torch.float64)
    assert shift_of(Mismatch(torch.eye(2, dtype=torch.float64), broken, None, 8), 1, 1) is None
