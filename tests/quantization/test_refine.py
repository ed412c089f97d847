"""Refining after GPTQ: fits are least squares, a sweep never adds error, and both stay on the grid."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.quantization.factor import factorise
from compress.quantization.gptq import choose_grid, solve
from compress.quantization.grid import Grid, dequantize, quantize
from compress.quantization.refine import Split, Swept, descended, fitted_scales, refined
from compress.quantization.scheme import BITS, Scheme
from tests.quantization.test_gptq import correlated, hessian_of


def _problem(rows=6, columns=48, scheme=None, seed=0, damping=0.01, stored=torch.float32):
    scheme = scheme or Scheme(3, True, 16)
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    hessian = hessian_of(correlated(4 * columns, columns, seed))
    factor = factorise(hessian, damping)
    (solution,) = solve([weight], hessian, factor, scheme, stored, "minmax")
    damped = (hessian + damping * hessian.diagonal().mean() * torch.eye(columns)).float()
    return weight, solution.codes, solution.grid, damped


def row_losses(target, codes, grid, hessian):
    """(v - w*) H (v - w*) of each row."""
    difference = dequantize(codes, grid).float() - target
    return ((difference @ hessian) * difference).sum(-1)


def test_the_example_of_the_docstring():
    """s = (1 x 1 + 2 x 2.2) / (1 + 4) = 1.08, pulled a twentieth towards the old scale of 1."""
    grid = Grid(Scheme(4, True, None), torch.ones(1, 1), None)
    codes = torch.tensor([[1, 2]], dtype=torch.int8)

    fitted = fitted_scales(torch.tensor([[1.0, 2.2]]), codes, grid, torch.eye(2))

    assert float(fitted.scale) == pytest.approx((5.4 + 0.05 * 5) / (5 + 0.05 * 5))


def test_fitted_scales_are_where_the_pulled_quadratic_is_least():
    weight, codes, grid, hessian = _problem(rows=3)
    fitted = fitted_scales(weight, codes, grid, hessian)

    scale = grid.scale.double().requires_grad_(True)
    values = (codes.double().view(3, 3, 16) * scale.unsqueeze(-1)).flatten(1)
    own = (codes.double().view(3, 3, 16).unsqueeze(-2) @ hessian.double().view(3, 16, 3, 16).diagonal(0, 0, 2)
           .permute(2, 0, 1) @ codes.double().view(3, 3, 16).unsqueeze(-1)).flatten(1)  # fmt: skip

    def objective(scale):
        values = (codes.double().view(3, 3, 16) * scale.unsqueeze(-1)).flatten(1)
        difference = values - weight.double()
        lost = ((difference @ hessian.double()) * difference).sum()
        return lost + (0.05 * own * (scale - grid.scale.double()).square()).sum()

    at = fitted.scale.double().requires_grad_(True)
    (gradient,) = torch.autograd.grad(objective(at), at)
    (before,) = torch.autograd.grad(objective(scale), scale)
    assert values.shape == weight.shape
    assert float(gradient.abs().max()) < 1e-3 * float(before.abs().max())


def test_a_sweep_finds_the_best_codes_of_a_diagonal_problem():
    """Without correlation every column is on its own: the nearest code is best, and brute force agrees."""
    scheme = Scheme(2, True, None)
    grid = Grid(scheme, torch.tensor([[0.5]]), None)
    target = torch.tensor([[0.3, -0.9, 0.6]])
    hessian = torch.diag(torch.tensor([1.0, 4.0, 2.0]))
    start = torch.zeros(1, 3, dtype=torch.int8)

    codes = descended(target, start, grid, Swept.of(hessian))

    every = [torch.tensor([each], dtype=torch.int8) for each in itertools.product(range(-2, 2), repeat=3)]
    best = min(every, key=lambda candidate: float(row_losses(target, candidate, grid, hessian)))
    assert torch.equal(codes, best)


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from(BITS),
    symmetric=st.booleans(),
    group=st.sampled_from([None, 8, 16]),
    columns=st.sampled_from([16, 80, 144]),
    dead=st.integers(0, 2),
    weights=st.sampled_from(["normal", "zero", "constant", "spiky"]),
    stored=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    seed=st.integers(0, 10**6),
)
def test_refining_never_adds_error_and_stays_on_the_grid(bits, symmetric, group, columns, dead, weights, stored, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = {
        "normal": torch.randn(5, columns, generator=generator),
        "zero": torch.zeros(5, columns),
        "constant": torch.full((5, columns), 0.37),
        "spiky": torch.randn(5, columns, generator=generator).pow(5),
    }[weights]
    inputs = correlated(3 * columns, columns, seed)
    inputs[:, :dead] = 0
    hessian = hessian_of(inputs).float()
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    scheme = Scheme(bits, symmetric, group)
    grid = choose_grid(weight, None, scheme, stored, "minmax")
    codes = quantize(weight, grid)

    better, fitted = refined(weight, codes, grid, Swept.of(hessian))

    assert int(better.min()) >= scheme.lowest and int(better.max()) <= scheme.highest
    assert fitted.scale.dtype == stored and bool(torch.isfinite(fitted.scale).all())
    assert bool(torch.isfinite(dequantize(better, fitted)).all())
    before, after = row_losses(weight, codes, grid, hessian), row_losses(weight, better, fitted, hessian)
    size = ((weight @ hessian) * weight).sum(-1)
    assert bool((after <= before * (1 + 1e-3) + 1e-5 * size).all())


def test_refining_gains_over_gptq_alone():
    weight, codes, grid, hessian = _problem(rows=32, columns=96)

    better, fitted = refined(weight, codes, grid, Swept.of(hessian))

    gain = row_losses(weight, better, fitted, hessian).sum() / row_losses(weight, codes, grid, hessian).sum()
    assert float(gain) < 0.9


def split(fitted, held_out):
    return Split(fitted.float(), held_out.float())


def test_held_out_tokens_decide_whether_a_refinement_is_kept():
    """Refined for tokens of quite another kind, the codes fit the held-out ones worse, and GPTQ's stay."""
    weight = torch.randn(24, 48, generator=torch.Generator().manual_seed(1))
    inputs = correlated(400, 48, 2)
    hessian, held_out, other = hessian_of(inputs), hessian_of(inputs[350:]), hessian_of(correlated(400, 48, 9))
    factor, scheme = factorise(hessian, 0.01), Scheme(3, True, 16)

    (agreed,) = solve(
        [weight], hessian, factor, scheme, torch.float16, "minmax", split(hessian_of(inputs[:350]), held_out)
    )
    (refused,) = solve([weight], hessian, factor, scheme, torch.float16, "minmax", split(other, held_out))
    (plain,) = solve([weight], hessian, factor, scheme, torch.float16, "minmax")

    assert agreed.refined and agreed.error < plain.error
    assert not refused.refined and torch.equal(refused.codes, plain.codes)


def test_rows_fitted_a_few_at_a_time_get_the_same_scales(monkeypatch):
    from compress.quantization import refine

    weight, codes, grid, hessian = _problem()
    together = fitted_scales(weight, codes, grid, hessian)
    monkeypatch.setattr(refine, "SYSTEM_NUMBERS", 2 * 3**2)

    torch.testing.assert_close(fitted_scales(weight, codes, grid, hessian).scale, together.scale)
