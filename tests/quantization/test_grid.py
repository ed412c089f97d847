"""Grids and scales, against brute force on four numbers and bounds on any."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.quantization.grid import Grid, dequantize, quantize
from compress.quantization.grid_search import minmax_grid, search_grid
from compress.quantization.scheme import BITS, Scheme, usable_group_sizes


def _squared_error(weight: torch.Tensor, grid: Grid, importance: torch.Tensor | None = None) -> float:
    error = (dequantize(quantize(weight, grid), grid).double() - weight.double()).square()
    return float((error if importance is None else error * importance.double()).sum())


def test_the_example_of_the_docstring():
    weight = torch.tensor([[0.7, -0.8, 0.06, 0.31]])
    grid = Grid(Scheme(4, True, 4), torch.tensor([[0.1]]), None)

    assert quantize(weight, grid).tolist() == [[7, -8, 1, 3]]
    torch.testing.assert_close(dequantize(quantize(weight, grid), grid), torch.tensor([[0.7, -0.8, 0.1, 0.3]]))


@pytest.mark.parametrize("zero", [None, -2, 1])
def test_quantize_picks_the_nearest_of_all_codes(zero):
    scheme = Scheme(3, zero is None, 4)
    scale = torch.tensor([[0.25]])
    grid = Grid(scheme, scale, None if zero is None else torch.tensor([[zero]], dtype=torch.int8))
    weight = torch.tensor([[0.61, -0.94, 0.05, 3.0]])

    values = {code: (code - (zero or 0)) * 0.25 for code in range(-4, 4)}
    nearest = [min(values, key=lambda code: abs(values[code] - w)) for w in weight[0].tolist()]
    assert quantize(weight, grid).tolist() == [nearest]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3])
def test_the_searched_grid_is_near_the_best_of_brute_force_on_four_numbers(bits, symmetric):
    """Over twelve draws; brute force tries 396 scales, both signs or every zero point."""
    scheme, sums = Scheme(bits, symmetric, 4), {"best": 0.0, "found": 0.0, "covering": 0.0}
    for seed in range(12):
        weight = torch.randn(1, 4, generator=torch.Generator().manual_seed(seed))
        best = _brute_force(weight, scheme)
        found = _squared_error(weight, search_grid(weight, None, scheme, torch.float32))
        covering = _squared_error(weight, minmax_grid(weight, scheme, torch.float32))
        assert found <= covering + 1e-7
        for name, error in (("best", best), ("found", found), ("covering", covering)):
            sums[name] += error

    # Zero points are not searched, only rounded, so an asymmetric grid stays further from the best.
    share = 0.3 if symmetric else 0.8
    assert sums["best"] - 1e-3 <= sums["found"] <= sums["best"] + share * (sums["covering"] - sums["best"])


def _brute_force(weight: torch.Tensor, scheme: Scheme) -> float:
    signs = (1, -1) if scheme.symmetric else (1,)
    zeros = [None] if scheme.symmetric else list(range(scheme.lowest, scheme.highest + 1))
    spread = float(weight.abs().max()) * 2
    return min(
        _squared_error(weight, Grid(scheme, torch.tensor([[sign * spread * step / 400]]), _int8(zero)))
        for step, sign, zero in itertools.product(range(4, 400), signs, zeros)
    )


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_free_minima_cost_less_than_integer_zero_points_and_those_less_than_shrunken_ranges(bits):
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(bits)) * 0.02
    importance = torch.rand(128, generator=torch.Generator().manual_seed(1)) + 0.05
    integer, free = Scheme(bits, False, 32), Scheme(bits, False, 32, free_minima=True)

    found = {
        "covering": _squared_error(weight, minmax_grid(weight, integer, torch.float16), importance),
        "integer": _squared_error(weight, search_grid(weight, importance, integer, torch.float16), importance),
        "free": _squared_error(weight, search_grid(weight, importance, free, torch.float16), importance),
    }

    assert found["integer"] < 0.9 * found["covering"]
    assert found["free"] < 0.85 * found["integer"]


def test_a_free_grid_is_near_the_best_of_brute_force_on_four_numbers():
    """Every pair of least and largest value on a fine mesh, for two bits."""
    scheme, sums = Scheme(2, False, 4, free_minima=True), {"best": 0.0, "found": 0.0, "covering": 0.0}
    mesh = torch.linspace(-1.3, 1.3, 105)
    for seed in range(12):
        weight = torch.randn(4, generator=torch.Generator().manual_seed(seed)).clamp(-1.2, 1.2)
        weight[0] = weight[0].abs() + 0.05
        low, high = (each.flatten() for each in torch.meshgrid(mesh[mesh <= 0], mesh, indexing="ij"))
        step = (high - low).clamp_min(1e-6).unsqueeze(1) / 3
        codes = ((weight - low.unsqueeze(1)) / step).round().clamp(0, 3)
        errors = (low.unsqueeze(1) + codes * step - weight).square().sum(1)
        sums["best"] += float(errors[high > low].min())
        sums["found"] += _squared_error(weight.view(1, 4), search_grid(weight.view(1, 4), None, scheme, torch.float32))
        sums["covering"] += _squared_error(weight.view(1, 4), minmax_grid(weight.view(1, 4), scheme, torch.float32))

    assert sums["best"] - 1e-2 <= sums["found"] <= sums["best"] + 0.3 * (sums["covering"] - sums["best"])


def _int8(zero: int | None) -> torch.Tensor | None:
    return None if zero is None else torch.tensor([[zero]], dtype=torch.int8)


def test_a_negative_scale_turns_the_long_side_to_the_larger_tail():
    weight = torch.tensor([[0.8, -0.7, 0.1, 0.3]])

    grid = search_grid(weight, None, Scheme(4, True, 4), torch.float32)

    assert float(grid.scale) < 0
    torch.testing.assert_close(dequantize(quantize(weight, grid), grid), weight, atol=0.01, rtol=0)


def test_importance_moves_the_grid_towards_the_columns_that_matter():
    weight = torch.tensor([[0.1, 0.23, -0.31, 2.0]])
    importance = torch.tensor([1.0, 1.0, 1.0, 1e-4])
    scheme = Scheme(3, True, 4)

    with_importance = search_grid(weight, importance, scheme, torch.float32)
    without = search_grid(weight, None, scheme, torch.float32)

    assert _squared_error(weight, with_importance, importance) < _squared_error(weight, without, importance) / 4


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from(BITS),
    symmetric=st.booleans(),
    free=st.booleans(),
    stored=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    magnitude=st.sampled_from([0.0, 1e-30, 1e-6, 1.0, 300.0, 1e5]),
    group=st.sampled_from([None, 2, 8]),
    rows=st.integers(1, 70),
    offset=st.sampled_from([0.0, 5.0, -5.0]),
    seed=st.integers(0, 10**6),
)
def test_scales_are_finite_never_zero_and_in_the_stored_dtype(
    bits, symmetric, free, stored, magnitude, group, rows, offset, seed
):
    weight = (torch.randn(rows, 16, generator=torch.Generator().manual_seed(seed)) + offset) * magnitude
    scheme = Scheme(bits, symmetric, group, free_minima=free and not symmetric)
    importance = torch.rand(16, generator=torch.Generator().manual_seed(seed + 1))

    for grid in (minmax_grid(weight, scheme, stored), search_grid(weight, importance, scheme, stored)):
        assert grid.scale.dtype == (torch.float32 if scheme.free_minima else stored) and grid.scale.shape == (
            rows,
            scheme.groups(16),
        )
        assert bool(torch.isfinite(grid.scale).all()) and bool((grid.scale != 0).all())
        assert (grid.zero is None) == symmetric
        codes = quantize(weight, grid)
        assert codes.dtype == torch.int8
        assert int(codes.min()) >= scheme.lowest and int(codes.max()) <= scheme.highest
        if magnitude < 1e5 or stored != torch.float16:
            assert bool(torch.isfinite(dequantize(codes, grid)).all())


@settings(max_examples=40, deadline=None)
@given(bits=st.sampled_from(BITS), symmetric=st.booleans(), seed=st.integers(0, 10**6), rows=st.integers(1, 9))
def test_the_search_never_loses_to_the_range_that_just_covers(bits, symmetric, seed, rows):
    weight = torch.randn(rows, 24, generator=torch.Generator().manual_seed(seed)).pow(3)
    scheme = Scheme(bits, symmetric, 8)

    searched, covering = (make(weight) for make in (_search(scheme), lambda w: minmax_grid(w, scheme, torch.float32)))

    assert _squared_error(weight, searched) <= _squared_error(weight, covering) * (1 + 1e-5) + 1e-12


def _search(scheme: Scheme):
    return lambda weight: search_grid(weight, None, scheme, torch.float32)


def test_rows_do_not_influence_each_other():
    weight = torch.randn(130, 32, generator=torch.Generator().manual_seed(3))
    scheme = Scheme(4, True, 16)

    whole = search_grid(weight, None, scheme, torch.float16)
    alone = search_grid(weight[77:78], None, scheme, torch.float16)

    assert torch.equal(whole.scale[77:78], alone.scale)


def test_an_asymmetric_grid_holds_zero_exactly():
    """Pruned and padded weights must stay zero, whatever the group's range."""
    weight = torch.tensor([[0.0, 3.1, 3.3, 3.2], [-5.0, -4.9, 0.0, -5.2]])
    for grid in (minmax_grid(weight, Scheme(4, False, 4), torch.float16), _search(Scheme(4, False, 4))(weight)):
        value = dequantize(quantize(weight, grid), grid)
        assert value[0, 0] == 0 and value[1, 2] == 0


@pytest.mark.parametrize(("columns", "nearby", "sizes"), [(172, 128, [43, 86, 172]), (341, 64, [11, 31, 341])])
def test_usable_group_sizes_are_divisors_near_the_one_asked(columns, nearby, sizes):
    assert usable_group_sizes(columns, nearby) == sizes


def test_effective_bits_count_scales_zero_points_and_shapes():
    rows, columns = 64, 128

    assert Scheme(4, True, 64).stored_bytes(rows, columns) == rows * 64 + rows * 2 * 2 + 16
    assert Scheme(4, False, 64).stored_bytes(rows, columns) == rows * 64 + rows * 2 * 2 + 32 * 2 + 16
    assert Scheme(3, True, None).stored_bytes(5, 37) == 5 * 16 + 5 * 2 + 16
