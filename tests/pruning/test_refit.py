"""Least squares on the columns that stay: against lstsq on the inputs themselves."""

from __future__ import annotations

import pytest
import torch

from compress.pruning.refit import output_error, refitted


def test_equals_least_squares_on_the_inputs():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(300, 7, generator=generator, dtype=torch.float64) @ torch.randn(7, 7, dtype=torch.float64)
    target, kept = torch.randn(3, 7, generator=generator), torch.tensor([0, 2, 3, 6])
    hessian = inputs.T @ inputs / 300

    done = refitted(target, hessian, kept, 1e-12)

    wanted = inputs @ target.double().T
    expected = torch.linalg.lstsq(inputs[:, kept], wanted).solution.T
    torch.testing.assert_close(done.weight, expected.float(), rtol=1e-4, atol=1e-4)
    left = inputs[:, kept] @ expected.T - wanted
    assert done.error == pytest.approx(float(left.square().sum() / wanted.square().sum()), rel=1e-6)
    gone = inputs[:, [1, 4, 5]] @ target.double()[:, [1, 4, 5]].T
    assert done.plain_error == pytest.approx(float(gone.square().sum() / wanted.square().sum()), rel=1e-6)
    assert done.error < done.plain_error


def test_the_example_of_the_docstring():
    done = refitted(torch.tensor([[2.0, 3.0]]), torch.ones(2, 2, dtype=torch.float64), torch.tensor([0]), 1e-12)

    assert float(done.weight) == pytest.approx(5)
    assert done.error == pytest.approx(0, abs=1e-9)


def test_a_large_ridge_leaves_what_was_there():
    target, hessian = torch.randn(2, 5), torch.eye(5, dtype=torch.float64) + 0.5
    done = refitted(target, hessian, torch.tensor([1, 3]), 1e9)

    torch.testing.assert_close(done.weight, target[:, [1, 3]], rtol=1e-6, atol=1e-6)


def test_nothing_goes_nothing_changes():
    target, hessian = torch.randn(2, 4), torch.eye(4, dtype=torch.float64)
    done = refitted(target, hessian, torch.arange(4), 0.01)

    assert torch.equal(done.weight, target) and done.error == 0 and done.plain_error == 0


def test_what_cannot_be_factorised_is_said():
    assert refitted(torch.ones(1, 2), -torch.eye(2, dtype=torch.float64), torch.tensor([0]), 0.01) is None
    assert output_error(torch.zeros(1, 2), None, torch.eye(2, dtype=torch.float64), torch.tensor([0])) == 0
