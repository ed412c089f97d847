"""Zeros among weights: the right share and pattern, and an update that makes up for them."""

from __future__ import annotations

import pytest
import torch

from compress.pruning.sparse import sparsegpt, upper_factor, wanda


def problem(columns=64, rows=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    inputs = torch.randn(4 * columns, columns, generator=generator, dtype=torch.float64) @ mixing
    return torch.randn(rows, columns, generator=generator), inputs.T @ inputs / len(inputs)


def error(weight, sparse, hessian):
    difference = (sparse - weight).double()
    return float(((difference @ hessian) * difference).sum())


def test_the_factor_is_that_of_the_inverse():
    hessian = problem()[1] + 50 * torch.eye(64, dtype=torch.float64)
    upper = upper_factor(hessian, 1e-9).double()

    assert torch.equal(upper, upper.triu())
    torch.testing.assert_close(upper.T @ upper @ hessian, torch.eye(64, dtype=torch.float64), rtol=1e-3, atol=1e-3)


def test_the_example_of_the_docstring():
    weight, hessian = torch.tensor([[3.0, -1.0, 2.0, 0.5]]), torch.eye(4, dtype=torch.float64)

    for found in (
        sparsegpt(weight, upper_factor(hessian, 1e-9), 0.5, "2:4"),
        wanda(weight, hessian.diagonal(), 0.5, "2:4"),
    ):
        torch.testing.assert_close(found, torch.tensor([[3.0, 0.0, 2.0, 0.0]]))


@pytest.mark.parametrize("columns", [64, 200])
@pytest.mark.parametrize(("pattern", "ratio"), [("2:4", 0.5), ("unstructured", 0.5), ("unstructured", 0.3)])
def test_shares_patterns_and_which_is_better(pattern, ratio, columns):
    weight, hessian = problem(columns)
    solved = sparsegpt(weight, upper_factor(hessian, 0.01), ratio, pattern)
    plain = wanda(weight, hessian.diagonal(), ratio, pattern)

    for found in (solved, plain):
        assert float((found == 0).float().mean()) == pytest.approx(ratio, abs=0.01)
        if pattern == "2:4":
            assert bool(((found.view(12, -1, 4) == 0).sum(-1) == 2).all())
    assert error(weight, solved, hessian) < 0.8 * error(weight, plain, hessian)
    assert torch.equal(plain[plain != 0], weight[plain != 0]), "wanda leaves what stays as it was"


def test_one_zero_is_made_up_for_exactly():
    """A single zero at the first column: the rest is the least-squares answer (Optimal Brain Surgeon)."""
    weight, hessian = problem(4, 1)
    weight[0, 0] = 1e-3
    found = sparsegpt(weight, upper_factor(hessian, 1e-9), 0.25, "unstructured")

    inverse = torch.linalg.inv(hessian)
    assert (found[0] == 0).nonzero().flatten().tolist() == [0]
    exact = weight.double() - weight.double()[:, :1] / inverse[0, 0] * inverse[0]
    torch.testing.assert_close(found.double()[:, 1:], exact[:, 1:], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), 0.0])
def test_no_factor_is_none(value):
    assert upper_factor(torch.full((4, 4), value, dtype=torch.float64), 0.01) is None
