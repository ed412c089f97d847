"""K-quants: their grids against the rules of their types, against brute force, and against grids that are free."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.quantization.factor import factorise
from compress.quantization.gptq import choose_grid, relative_error, solve
from compress.quantization.grid import Grid, dequantize, quantize
from compress.quantization.grid_search import line, search_grid
from compress.quantization.k_quants import _plane, k_quant_grid
from compress.quantization.refine import Split, fitted_scales
from compress.quantization.scheme import Scheme
from compress.quantization.super_blocks import K_QUANTS, SuperBlocks

BITS = sorted(K_QUANTS)


def _weight(rows: int = 8, columns: int = 512, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02


def _error(weight: torch.Tensor, grid: Grid, importance: torch.Tensor | None = None) -> float:
    difference = (dequantize(quantize(weight, grid), grid) - weight).double().square()
    return float((difference if importance is None else difference * importance).sum())


def test_the_example_of_the_docstring():
    made_of = SuperBlocks(
        torch.tensor([[0.01]]).half(),
        torch.full((1, 8), 20, dtype=torch.int8),
        torch.tensor([[0.02]]).half(),
        torch.full((1, 8), 30, dtype=torch.int8),
    )
    grid = Grid.of_super_blocks(Scheme.of_k_quant(4), made_of)

    values = dequantize(torch.full((1, 256), -3, dtype=torch.int8), grid)

    torch.testing.assert_close(values, torch.full((1, 256), 0.4), atol=1e-3, rtol=0)


@pytest.mark.parametrize("bits", BITS)
def test_bits_a_weight_are_those_of_the_type(bits):
    told = {2: 2.625, 3: 3.4375, 4: 4.5, 5: 5.5, 6: 6.5625}

    assert 8 * Scheme.of_k_quant(bits).stored_bytes(3, 512) / (3 * 512) == told[bits]
    assert Scheme.from_json(Scheme.of_k_quant(bits).to_json()) == Scheme.of_k_quant(bits)


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from(BITS),
    magnitude=st.sampled_from([0.0, 1e-30, 1e-6, 0.02, 300.0, 1e5]),
    offset=st.sampled_from([0.0, 5.0, -5.0]),
    rows=st.integers(1, 70),
    constant=st.booleans(),
    searched=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_integers_are_in_range_and_values_finite(bits, magnitude, offset, rows, constant, searched, seed):
    weight = (_weight(rows, 256, seed) * 50 + offset) * magnitude
    if constant:
        weight[:, :64] = weight[0, 0]
        weight[:, 64:96] = 0
    layout, scheme = K_QUANTS[bits], Scheme.of_k_quant(bits)

    grid = k_quant_grid(weight, torch.rand(256, generator=torch.Generator().manual_seed(seed)), scheme, searched)

    made_of = grid.nested
    assert isinstance(made_of, SuperBlocks) and made_of.scale.dtype == torch.float16
    assert made_of.scale.shape == (rows, 1) and made_of.scales.shape == (rows, 256 // layout.width)
    assert layout.lowest <= int(made_of.scales.min()) and int(made_of.scales.max()) <= layout.highest
    assert bool((made_of.scales != 0).all()) and bool((grid.scale != 0).all())
    assert (made_of.minima is None) == layout.symmetric
    if made_of.minima is not None:
        assert int(made_of.minima.min()) >= 0 and int(made_of.minima.max()) <= layout.most
    codes = quantize(weight, grid)
    assert scheme.lowest <= int(codes.min()) and int(codes.max()) <= scheme.highest
    assert bool(torch.isfinite(dequantize(codes, grid)).all())


@pytest.mark.parametrize("bits", BITS)
def test_the_search_is_better_than_covering_and_close_to_scales_that_are_free(bits):
    weight, importance = _weight(32), torch.rand(512, generator=torch.Generator().manual_seed(1)) + 0.05
    scheme = Scheme.of_k_quant(bits)
    unnested = Scheme(bits, scheme.symmetric, scheme.group_size, free_minima=not scheme.symmetric)
    free = search_grid(weight, importance, unnested, torch.float32)

    searched = _error(weight, k_quant_grid(weight, importance, scheme), importance)

    assert searched < 0.8 * _error(weight, k_quant_grid(weight, importance, scheme, search=False), importance)
    assert searched < 1.1 * _error(weight, free, importance)


@pytest.mark.parametrize("bits", BITS)
def test_importance_is_followed(bits):
    weight = _weight(16, 256)
    importance = torch.ones(256)
    importance[::2] = 50

    heeded = k_quant_grid(weight, importance, Scheme.of_k_quant(bits))
    plain = k_quant_grid(weight, None, Scheme.of_k_quant(bits))

    assert _error(weight, heeded, importance) < 0.95 * _error(weight, plain, importance)


def test_least_squares_of_a_line_and_of_a_plane_against_a_solver():
    generator = torch.Generator().manual_seed(3)
    q = torch.randint(0, 16, (1, 64), generator=generator).double()
    m = torch.randint(1, 63, (1, 64), generator=generator).double()
    weights = torch.rand(1, 64, generator=generator).double() + 0.1
    target = 0.3 * q - 0.2 * m + torch.randn(1, 64, generator=generator)
    root = weights.sqrt().T

    scale, minimum = line(q, 0.3 * q - 2 + 0.1 * target, weights)
    design = torch.cat([q.T, -torch.ones(64, 1)], dim=1) * root
    solved = torch.linalg.lstsq(design, (0.3 * q - 2 + 0.1 * target).T * root).solution.flatten()
    torch.testing.assert_close(torch.cat([scale, minimum]), solved)

    scale, minimum = _plane(q, m, target, weights)
    solved = torch.linalg.lstsq(torch.cat([q.T, -m.T], dim=1) * root, target.T * root).solution.flatten()
    torch.testing.assert_close(torch.cat([scale, minimum]), solved)


def test_a_line_through_positive_numbers_starts_at_zero():
    q = torch.arange(16.0).unsqueeze(0)

    scale, minimum = line(q, 2 * q + 5, torch.ones(16))

    assert float(minimum) == 0 and float(scale) > 2


@pytest.mark.parametrize("bits", BITS)
def test_solving_is_better_than_rounding_and_refining_better_still_where_it_is_kept(bits):
    generator = torch.Generator().manual_seed(bits)
    mixing = torch.randn(512, 512, generator=generator) / 23
    inputs = torch.randn(4096, 512, generator=generator) @ mixing
    other = torch.randn(2048, 512, generator=generator) @ mixing
    hessian, held_out = ((each.T @ each / len(each)).double() for each in (inputs, other))
    weight, scheme = _weight(24), Scheme.of_k_quant(bits)
    factor = factorise(hessian, 0.01)
    assert factor is not None

    (plain,) = solve([weight], hessian.float(), factor, scheme, torch.float16)
    split = Split(hessian.float(), held_out.float())
    (refined,) = solve([weight], hessian.float(), factor, scheme, torch.float16, split=split)

    rounded = choose_grid(weight, None, scheme, torch.float16, "mse")
    assert plain.error < 0.9 * relative_error(weight, dequantize(quantize(weight, rounded), rounded), hessian.float())
    assert refined.refined and refined.error < plain.error
    for solution in (plain, refined):
        made_of = solution.grid.nested
        assert isinstance(made_of, SuperBlocks)
        assert torch.equal(Grid.of_super_blocks(scheme, made_of).scale, solution.grid.scale)
        assert made_of.scale.dtype == torch.float16


@pytest.mark.parametrize("bits", BITS)
def test_fitted_scales_of_super_blocks_are_those_of_a_solver(bits):
    """One row, no pull towards the old ones to speak of: d by least squares in the norm of H."""
    weight, scheme = _weight(1), Scheme.of_k_quant(bits)
    hessian = torch.eye(512) + 0.5 * torch.ones(512, 512) / 512
    grid = k_quant_grid(weight, None, scheme, search=False)
    codes = quantize(weight, grid)

    fitted = fitted_scales(weight, codes, grid, hessian)

    root = torch.linalg.cholesky(hessian.double())
    multiples = grid.multiples(codes).double()[0]
    basis = torch.zeros(512, 2, dtype=torch.float64)
    basis[:256, 0], basis[256:, 1] = multiples
    made_of = grid.nested
    assert isinstance(made_of, SuperBlocks)
    minima = made_of.group_minima()
    taken_off = 0 if minima is None else minima.double().repeat_interleave(scheme.group_size or 1, dim=1)[0]
    solved = torch.linalg.lstsq(root.T @ basis, root.T @ (weight[0].double() + taken_off)).solution
    old = grid.free_scales[0].double()
    # `MU` holds a twentieth back.
    torch.testing.assert_close(fitted.free_scales[0].double(), old + (solved - old) / 1.05, rtol=2e-3, atol=0)


def test_rows_in_another_order_keep_their_grid():
    weight, order = _weight(5), torch.tensor([3, 1, 0, 4, 2])
    grid = k_quant_grid(weight, None, Scheme.of_k_quant(4))
    codes = quantize(weight, grid)

    assert torch.equal(dequantize(codes[order], grid.at(order)), dequantize(codes, grid)[order])
    assert torch.equal(dequantize(codes[1:3], grid.rows(1, 3)), dequantize(codes, grid)[1:3])
