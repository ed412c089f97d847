"""The GPTQ solver: never worse than rounding, equal to a slow textbook version, and at ease with broken Hessians."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.quantization.factor import _flipped_inverse, factorise
from compress.quantization.gptq import choose_grid, relative_error, rounded, solve
from compress.quantization.grid import Grid, dequantize, quantize
from compress.quantization.scheme import BITS, Scheme


def hessian_of(inputs: Tensor) -> Tensor:
    return inputs.double().T @ inputs.double() / len(inputs)


def correlated(tokens: int, columns: int, seed: int) -> Tensor:
    """Inputs whose columns depend on each other and differ in size, as those of real models do."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    sizes = torch.exp(torch.randn(columns, generator=generator))
    return torch.randn(tokens, columns, generator=generator) @ mixing * sizes


def lost(weight: Tensor, value: Tensor, hessian: Tensor) -> float:
    difference = value.double() - weight.double()
    return float(((difference @ hessian) * difference).sum())


def textbook(weight: Tensor, hessian: Tensor, grid: Grid, order: Tensor, damping: float) -> Tensor:
    """Algorithm 1 of arXiv 2210.17323, one column at a time in float64, in the given order."""
    columns = len(order)
    diagonal = hessian.diagonal().clone()
    damped = hessian + torch.diag((diagonal <= 0).double()) * diagonal.mean()
    damped = damped + torch.eye(columns, dtype=torch.float64) * damping * diagonal.mean()
    inverse = torch.linalg.inv(damped[order][:, order])
    upper = torch.linalg.cholesky(inverse, upper=True)
    work, codes = weight.double()[:, order].clone(), torch.zeros_like(weight, dtype=torch.int8)
    width = grid.scheme.width(columns)
    for position, column in enumerate(order.tolist()):
        group = column // width
        one = Grid(
            grid.scheme,
            grid.scale[:, group : group + 1],
            None if grid.zero is None else grid.zero[:, group : group + 1],
        )
        code = quantize(work[:, position : position + 1].float(), one)
        error = (work[:, position] - dequantize(code, one)[:, 0].double()) / upper[position, position]
        work[:, position + 1 :] -= error[:, None] * upper[position, position + 1 :][None]
        codes[:, column] = code[:, 0]
    return codes


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize(("rows", "columns", "group"), [(5, 8, 4), (3, 40, 8), (16, 150, None), (7, 96, 32)])
def test_codes_equal_the_textbooks(rows, columns, group, symmetric):
    scheme = Scheme(4, symmetric, group)
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
    hessian = hessian_of(correlated(columns * 4, columns, seed=columns))
    factor = factorise(hessian, 0.01)
    grid = choose_grid(weight, factor.pivots, scheme, torch.float32, "minmax")

    (solution,) = solve([weight], hessian, factor, scheme, torch.float32, "minmax")

    expected = textbook(weight, hessian, grid, factor.order, factor.damping)
    assert (solution.codes == expected).float().mean() >= 0.995, "only a tie may fall the other way"
    ours, theirs = (lost(weight, dequantize(codes, grid), hessian) for codes in (solution.codes, expected))
    assert ours == pytest.approx(theirs, rel=1e-2)
    assert not torch.equal(solution.codes, quantize(weight, grid)), "no feedback happened"


def test_columns_are_taken_by_descending_excitation():
    hessian = torch.diag(torch.tensor([1.0, 9.0, 4.0, 16.0], dtype=torch.float64))

    assert factorise(hessian, 0.01).order.tolist() == [3, 1, 2, 0]


def test_the_factor_is_the_cholesky_factor_of_the_damped_inverse():
    hessian = hessian_of(correlated(64, 12, seed=1))
    factor = factorise(hessian, 0.05)

    damped = (hessian + 0.05 * hessian.diagonal().mean() * torch.eye(12))[factor.order][:, factor.order]
    upper = factor.upper.double()
    torch.testing.assert_close(upper.T @ upper, torch.linalg.inv(damped), rtol=1e-4, atol=1e-5)
    pivots = 1 / upper.diagonal().square()
    torch.testing.assert_close(factor.pivots[factor.order].double(), pivots, rtol=1e-4, atol=0)


@settings(max_examples=120, deadline=None)
@given(
    bits=st.sampled_from(BITS),
    symmetric=st.booleans(),
    group=st.sampled_from([None, 4, 8]),
    groups=st.integers(1, 9),
    rows=st.integers(1, 9),
    tokens=st.integers(1, 60),
    dead=st.integers(0, 3),
    huge=st.sampled_from([1.0, 1e2, 1e4]),
    weights=st.sampled_from(["normal", "zero", "constant", "tiny", "spiky"]),
    scales=st.sampled_from(["minmax", "mse", "weighted"]),
    stored=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    seed=st.integers(0, 10**6),
)
def test_the_solution_is_never_worse_than_rounding_and_stays_on_its_grid(
    bits, symmetric, group, groups, rows, tokens, dead, huge, weights, scales, stored, seed
):
    columns = groups * 8
    generator = torch.Generator().manual_seed(seed)
    inputs = correlated(tokens, columns, seed)
    inputs[:, columns // 2] *= huge
    inputs[:, :dead] = 0
    weight = {
        "normal": torch.randn(rows, columns, generator=generator),
        "zero": torch.zeros(rows, columns),
        "constant": torch.full((rows, columns), 0.37),
        "tiny": torch.randn(rows, columns, generator=generator) * 1e-7,
        "spiky": torch.randn(rows, columns, generator=generator).pow(5),
    }[weights]
    hessian, scheme = hessian_of(inputs), Scheme(bits, symmetric, group)

    factor = factorise(hessian, 0.01)
    (solution,) = solve([weight], hessian, factor, scheme, stored, scales)

    assert int(solution.codes.min()) >= scheme.lowest and int(solution.codes.max()) <= scheme.highest
    assert bool(torch.isfinite(solution.grid.scale).all()) and solution.grid.scale.dtype == stored
    value = dequantize(solution.codes, solution.grid)
    assert bool(torch.isfinite(value).all())
    assert solution.error <= solution.rounding_error
    plain = dequantize(quantize(weight, solution.grid), solution.grid)
    total = lost(torch.zeros_like(weight), weight, hessian)
    assert lost(weight, value, hessian) <= lost(weight, plain, hessian) * (1 + 1e-3) + 1e-5 * total


def test_feedback_halves_the_error_on_correlated_inputs():
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    hessian = hessian_of(correlated(256, 64, seed=0))

    (solution,) = solve([weight], hessian, factorise(hessian, 0.01), Scheme(3, True, 32), torch.float16)

    assert solution.error < 0.7 * solution.rounding_error


def test_stacked_linears_get_the_codes_they_get_alone():
    hessian = hessian_of(correlated(128, 48, seed=2))
    factor, scheme = factorise(hessian, 0.01), Scheme(4, True, 16)
    weights = [torch.randn(rows, 48, generator=torch.Generator().manual_seed(rows)) for rows in (5, 1, 9)]

    together = solve(weights, hessian, factor, scheme, torch.float16)

    for weight, solution in zip(weights, together, strict=True):
        (alone,) = solve([weight], hessian, factor, scheme, torch.float16)
        assert torch.equal(solution.codes, alone.codes) and torch.equal(solution.grid.scale, alone.grid.scale)


@pytest.mark.parametrize("block", [1, 7, 64, 500])
def test_the_block_size_of_the_column_loop_does_not_change_the_result(block):
    hessian = hessian_of(correlated(300, 96, seed=4))
    weight = torch.randn(6, 96, generator=torch.Generator().manual_seed(4))
    factor, scheme = factorise(hessian, 0.01), Scheme(4, True, 32)

    (solution,) = solve([weight], hessian, factor, scheme, torch.float16, block=block)
    (reference,) = solve([weight], hessian, factor, scheme, torch.float16, block=96)

    assert (solution.codes == reference.codes).float().mean() > 0.99


def test_dead_columns_are_rounded_not_zeroed():
    inputs = correlated(64, 16, seed=5)
    inputs[:, [2, 11]] = 0
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(5))
    hessian = hessian_of(inputs)
    factor = factorise(hessian, 0.01)

    (solution,) = solve([weight], hessian, factor, Scheme(4, True, None), torch.float16)

    assert factor.dead == 2
    nearest = quantize(weight, solution.grid)
    assert torch.equal(solution.codes[:, [2, 11]], nearest[:, [2, 11]])
    assert bool((solution.codes[:, [2, 11]] != 0).any())


def test_all_columns_dead_is_plain_rounding():
    weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(6))
    hessian = torch.zeros(8, 8, dtype=torch.float64)
    factor = factorise(hessian, 0.01)

    (solution,) = solve([weight], hessian, factor, Scheme(4, True, None), torch.float16)

    assert factor.dead == 8
    assert torch.equal(solution.codes, quantize(weight, solution.grid))


@pytest.mark.parametrize("step", [512, 7])
def test_the_inverse_by_panels_is_the_inverse(step):
    lower = torch.linalg.cholesky(torch.eye(30, dtype=torch.float64) + correlated(90, 30, seed=3).double().T.cov())

    upper = _flipped_inverse(lower, step).double()

    torch.testing.assert_close(upper @ lower.flip(0, 1), torch.eye(30, dtype=torch.float64), rtol=0, atol=1e-5)
    assert bool((upper.tril(-1) == 0).all())


@pytest.mark.parametrize(("smallest", "multiple"), [(0.5, 1), (-0.02, 3), (-0.07, 10), (-0.2, 30)])
def test_the_damping_that_was_needed_is_recorded(smallest, multiple):
    factor = factorise(_with_smallest_eigenvalue(smallest), 0.01)

    assert factor.damping == pytest.approx(0.01 * multiple)


def test_no_damping_on_the_ladder_means_no_factor():
    assert factorise(_with_smallest_eigenvalue(-0.9), 0.01) is None


def _with_smallest_eigenvalue(value: float) -> Tensor:
    """A symmetric matrix with unit mean diagonal; its smallest eigenvalue is `value`, in no coordinate direction."""
    rotation = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    rest = (6 - value) / 5
    matrix = rotation @ torch.diag(torch.tensor([value, *[rest] * 5], dtype=torch.float64)) @ rotation.T
    return (matrix + matrix.T) / 2


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_hessian_that_is_not_finite_falls_back_to_rounding(bad):
    weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(7))
    inputs = correlated(32, 8, seed=7)
    inputs[3, 5] = bad
    hessian, scheme = hessian_of(inputs), Scheme(4, True, 8)

    factor = factorise(hessian, 0.01)
    (solution,) = solve([weight], hessian, factor, scheme, torch.float16)

    assert factor is None and solution.damping is None
    expected = rounded(weight, None, scheme, torch.float16, "mse")
    assert torch.equal(solution.codes, expected.codes)
    assert solution.error == solution.rounding_error == pytest.approx(expected.error)


def test_the_relative_error_is_the_share_of_output_energy_lost():
    inputs = correlated(50, 6, seed=8)
    weight = torch.randn(3, 6, generator=torch.Generator().manual_seed(8))
    value = weight + 0.1

    output = inputs @ weight.T
    expected = float((inputs @ value.T - output).square().sum() / output.square().sum())
    assert relative_error(weight, value, hessian_of(inputs)) == pytest.approx(expected, rel=1e-4)
    without = float((value - weight).square().sum() / weight.square().sum())
    assert relative_error(weight, value, None) == pytest.approx(without)


def test_the_value_fed_back_is_the_one_a_runtime_computes():
    """In bfloat16 code * scale is rounded: feeding back the unrounded product would compensate the wrong error."""
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(9))
    hessian = hessian_of(correlated(256, 64, seed=9))
    factor, scheme = factorise(hessian, 0.01), Scheme(8, True, None)
    grid = choose_grid(weight, factor.pivots, scheme, torch.bfloat16, "minmax")

    (solution,) = solve([weight], hessian, factor, scheme, torch.bfloat16, "minmax")

    expected = textbook(weight, hessian, grid, factor.order, factor.damping)
    assert (solution.codes == expected).float().mean() > 0.97
