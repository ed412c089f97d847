"""Feedback along rows is GPTQ on the Kronecker product of both sides' moments, and is left out where it would harm."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compress.quantization.columns import solve_columns
from compress.quantization.factor import factorise
from compress.quantization.gptq import solve
from compress.quantization.grid import Grid, dequantize, quantize
from compress.quantization.row_feedback import (
    Band,
    Rounded,
    bands_of,
    below_each_other,
    expected,
    rounded_with_feedback,
)
from compress.quantization.scheme import Scheme
from tests.quantization.test_gptq import correlated, hessian_of

SCHEME = Scheme(4, True, None)


def moments(size: int, seed: int) -> Tensor:
    return hessian_of(correlated(4 * size, size, seed=seed))


def band_of(outputs: Tensor) -> Band:
    factor = factorise(outputs, 0.1)
    assert factor is not None
    return Band.of(factor, 0)


def lost(difference: Tensor, outputs: Tensor, hessian: Tensor) -> float:
    """tr(G E H E^T)."""
    return float((outputs @ difference.double() @ hessian * difference.double()).sum())


def unit_grid(rows: int) -> Grid:
    return Grid(SCHEME, torch.ones(rows, 1), None)


def test_the_example_of_the_module():
    outputs = torch.tensor([[1.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    factor = factorise(outputs, 1e-9)
    target = torch.tensor([[0.4], [0.35]])

    def nearest(rows: Tensor, sizes: list[int]) -> Rounded:
        grid = unit_grid(len(rows))
        return Rounded(quantize(rows, grid), grid, torch.zeros(len(rows), dtype=torch.bool))

    found = rounded_with_feedback(target, [Band.of(factor, 0)], nearest, step=1)

    assert found.codes.tolist() == [[0], [1]]
    hessian = torch.ones(1, 1, dtype=torch.float64)
    assert lost(target - found.codes, outputs, hessian) == pytest.approx(0.3225)
    assert lost(target, outputs, hessian) == pytest.approx(0.4225), "where both round to 0"


@pytest.mark.parametrize("seed", range(3))
def test_a_row_at_a_time_it_is_gptq_on_the_kronecker_product(seed):
    """One long row whose Hessian is G x H, its columns in the order of rows, then columns: the same codes."""
    rows, columns = 6, 8
    outputs, hessian = moments(rows, seed), moments(columns, seed + 10)
    outer, inner = factorise(outputs, 0.03), factorise(hessian, 0.01)
    weight = 3 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))

    def gptq(target: Tensor, sizes: list[int]) -> Rounded:
        grid = unit_grid(len(target))
        codes = solve_columns(target, inner.order, inner.upper, grid)
        return Rounded(codes, grid, torch.zeros(len(target), dtype=torch.bool))

    found = rounded_with_feedback(weight, [Band.of(outer, 0)], gptq, step=1)

    long = weight[outer.order][:, inner.order].reshape(1, -1)
    upper = torch.kron(outer.upper, inner.upper)
    expected = solve_columns(long, torch.arange(rows * columns), upper, unit_grid(1))
    assert torch.equal(found.codes[outer.order][:, inner.order].reshape(1, -1), expected)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_it_costs_the_output_less(bits, symmetric):
    outputs, hessian = moments(48, 1), moments(64, 2)
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(3))
    arguments = ([weight], hessian, factorise(hessian, 0.01), Scheme(bits, symmetric, 32), torch.float16)

    (alone,) = solve(*arguments)
    (together,) = solve(*arguments, outputs=[[band_of(outputs)]])

    before, after = (
        lost(dequantize(each.codes, each.grid).float() - weight, outputs, hessian) for each in (alone, together)
    )
    assert after < 0.9 * before
    assert together.error <= together.rounding_error


def test_heads_get_it_where_other_text_agrees():
    """One head whose outputs matter together in both halves of the text, and one of which either half says its own."""
    same, one, other = moments(16, 1), moments(16, 2), moments(16, 3)

    bands = bands_of(torch.stack([torch.stack([same, one]), torch.stack([same, other])]).float())

    assert [band.upper is None for band in bands] == [False, True]
    assert sorted(bands[0].rows.tolist()) == list(range(16)) and bands[1].rows.tolist() == list(range(16, 32))


def test_what_feedback_is_expected_to_cost_is_what_it_costs():
    """Rounding errors of one size, by simulation: the residual of row i is noise, later rows take their share of it."""
    truth, seen = moments(12, 1), moments(12, 1) + 0.3 * moments(12, 2)
    factor = factorise(seen, 0.1)
    noise = torch.randn(12, 20_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    upper = factor.upper.double()

    errors = upper.T @ (noise / upper.diagonal().unsqueeze(1))

    ordered = truth[factor.order][:, factor.order]
    ratio = float((ordered @ errors * errors).sum() / (ordered @ noise * noise).sum())
    assert expected(factor, truth) == pytest.approx(ratio, rel=0.03)
    assert expected(factor, torch.zeros_like(truth)) == float("inf")


def test_shorter_steps_do_better():
    rows = 64
    outputs, hessian = moments(rows, 1), moments(32, 2)
    weight = torch.randn(rows, 32, generator=torch.Generator().manual_seed(3))
    factor = factorise(hessian, 0.01)

    def gptq(target: Tensor, sizes: list[int]) -> Rounded:
        grid = Grid(SCHEME, torch.full((len(target), 1), 0.4), None)
        codes = solve_columns(target, factor.order, factor.upper, grid)
        return Rounded(codes, grid, torch.zeros(len(target), dtype=torch.bool))

    losses = []
    for step in (1, 8, 64):
        found = rounded_with_feedback(weight, [band_of(outputs)], gptq, step)
        losses.append(lost(dequantize(found.codes, found.grid).float() - weight, outputs, hessian))
    assert losses[0] < losses[1] < losses[2]


def test_outputs_that_do_not_matter_together_change_nothing():
    hessian = moments(64, 2)
    weights = [torch.randn(rows, 64, generator=torch.Generator().manual_seed(rows)) for rows in (40, 9)]
    arguments = (weights, hessian, factorise(hessian, 0.01), Scheme(3, True, 32), torch.float16)
    bands = [[band_of(torch.diag(torch.rand(len(weight), dtype=torch.float64) + 0.1))] for weight in weights]

    for alone, together in zip(solve(*arguments), solve(*arguments, outputs=bands), strict=True):
        assert (alone.codes == together.codes).float().mean() > 0.999
        assert torch.equal(alone.grid.scale, together.grid.scale)


def test_bands_are_matrices_of_their_own():
    """Rows of two bands never feel each other, whether they belong to one matrix or to two."""
    hessian = moments(32, 2)
    factor = factorise(hessian, 0.01)
    weight = torch.randn(40, 32, generator=torch.Generator().manual_seed(1))
    outputs = [moments(24, 5), moments(16, 6)]
    arguments = (hessian, factor, Scheme(4, True, 32), torch.float16)
    bands = [band_of(outputs[0]), band_of(outputs[1])]

    (whole,) = solve([weight], *arguments, outputs=[[bands[0], Band(bands[1].rows + 24, bands[1].upper)]])
    parts = solve([weight[:24], weight[24:]], *arguments, outputs=[[bands[0]], [bands[1]]])

    assert torch.equal(whole.codes, torch.cat([part.codes for part in parts]))
    assert [band.rows.min().item() for band in below_each_other([[bands[0]], [bands[1]]], [24, 16])] == [0, 24]


def test_k_quants_and_refinements_go_through_it():
    from compress.quantization.refine import Split

    hessian = moments(256, 2)
    outputs = moments(48, 1)
    weight = torch.randn(48, 256, generator=torch.Generator().manual_seed(1))
    split = Split(hessian.float(), moments(256, 3).float())
    for scheme in (Scheme(4, True, 32), Scheme.of_k_quant(4)):
        arguments = ([weight], hessian, factorise(hessian, 0.01), scheme, torch.float16)
        (alone,) = solve(*arguments, split=split)
        (together,) = solve(*arguments, split=split, outputs=[[band_of(outputs)]])
        before, after = (
            lost(dequantize(each.codes, each.grid).float() - weight, outputs, hessian) for each in (alone, together)
        )
        assert after < before


def test_where_it_is_worse_than_rounding_rows_are_solved_each_for_itself():
    """Inputs that say nothing to feedback along columns: what rows make up for can only raise the error by H."""
    outputs, hessian = moments(48, 1), torch.eye(64, dtype=torch.float64)
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(3))
    arguments = ([weight], hessian, factorise(hessian, 0.01), Scheme(4, True, 32), torch.float16)

    (alone,) = solve(*arguments)
    (together,) = solve(*arguments, outputs=[[band_of(outputs)]])

    assert together.left_alone and not alone.left_alone
    assert torch.equal(together.codes, alone.codes) and together.error <= together.rounding_error
