"""Sums over a linear's inputs equal their definitions, with masks, weights, and a source stream beside some tokens."""

from __future__ import annotations

import pytest
import torch

from compress.calibration import integer_rows
from compress.calibration.statistics import InputStatistics
from tests.tiny import CPU


def _random(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("columns", [5, 192, 500])
def test_the_hessian_is_the_mean_outer_product_of_unmasked_tokens(columns):
    generator = torch.Generator().manual_seed(columns)
    statistics, rows = InputStatistics(columns, CPU), []
    for _ in range(3):
        inputs = torch.randn(2, 7, columns, generator=generator)
        mask = (torch.rand(2, 7, generator=generator) > 0.3).long()
        statistics.add(inputs, mask)
        rows.append(inputs[mask.bool()])
    kept = torch.cat(rows).double()

    assert statistics.tokens == len(kept)
    assert statistics.mismatch() is None
    torch.testing.assert_close(statistics.hessian()[0], kept.T @ kept / len(kept), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("columns", [5, 500])
def test_the_mismatch_covers_just_the_tokens_with_a_reference(columns):
    alone, inputs, reference = (_random(2, 7, columns, seed=seed) for seed in range(3))
    residual, source_residual = (_random(2, 7, 3, seed=seed) for seed in (3, 4))
    statistics = InputStatistics(columns, CPU)
    statistics.add_pair(inputs, reference, None, (residual, source_residual))
    statistics.add(alone, None)

    x, error = inputs.flatten(0, 1).double(), (reference - inputs).flatten(0, 1).double()
    beside = (source_residual - residual).flatten(0, 1).double()
    mismatch = statistics.mismatch()
    assert mismatch.tokens == 14 and statistics.tokens == 28
    torch.testing.assert_close(mismatch.hessian, x.T @ x / 14, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mismatch.cross, error.T @ x / 14, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mismatch.residual, beside.T @ x / 14, rtol=1e-4, atol=1e-5)
    every = torch.cat([x, alone.flatten(0, 1).double()])
    torch.testing.assert_close(statistics.hessian()[0], every.T @ every / 28, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not integer_rows.exact_here(), reason="no exact products of integers on this CPU")
@pytest.mark.parametrize("weighted", [False, True])
def test_sums_over_integers_are_nearly_the_same(weighted):
    inputs, error = _random(5, 400, 40, seed=0), 0.05 * _random(5, 400, 40, seed=1)
    mask = (_random(5, 400, seed=2) > -1).long()
    weights = torch.rand(5, 400, generator=torch.Generator().manual_seed(3)) if weighted else None
    found = {}
    for products in (torch.float32, torch.bfloat16):
        statistics = InputStatistics(40, CPU, products)
        for batch in (slice(at, at + 1) for at in range(4)):
            here, there = inputs[batch], (inputs + error)[batch]
            each = None if weights is None else weights[batch]
            statistics.add_pair(here, there, mask[batch], (here[..., :7], there[..., :7]), each)
        statistics.add(inputs[4:], mask[4:], None if weights is None else weights[4:])
        found[products] = statistics.mismatch(), statistics.hessian()[0], statistics.tokens

    (exact, whole, _), (rounded, other_whole, _) = found.values()
    pairs = {name: (getattr(exact, name), getattr(rounded, name)) for name in ("hessian", "cross", "residual")}
    for name, (one, other) in {**pairs, "whole": (whole, other_whole)}.items():
        limit = 4e-3 if name in ("hessian", "whole") else 2e-2
        assert 0 < float((one - other).norm() / one.norm()) < limit, name


def test_a_weight_of_two_counts_a_token_twice_in_every_sum():
    inputs, reference = _random(1, 4, 6, seed=0), _random(1, 4, 6, seed=1)
    mask = torch.tensor([[1, 1, 1, 0]])
    weights = torch.tensor([[2.0, 0.5, 0.5, 9.0]])
    statistics = InputStatistics(6, CPU)
    statistics.add_pair(inputs, reference, mask, (reference, inputs), weights)

    rows, others = inputs[0, :3].double(), reference[0, :3].double()
    weighted = rows * weights[0, :3, None].double()
    mismatch = statistics.mismatch()
    torch.testing.assert_close(statistics.hessian()[0], weighted.T @ rows / 3, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mismatch.hessian, weighted.T @ rows / 3, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mismatch.cross, (others - rows).T @ weighted / 3, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mismatch.residual, (rows - others).T @ weighted / 3, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("products", [torch.float32, torch.bfloat16])
def test_weights_count_in_what_is_held_out(products):
    fitted, held = _random(1, 300, 6, seed=0), _random(1, 300, 6, seed=1)
    weights = torch.linspace(0, 3, 300).unsqueeze(0)
    statistics = InputStatistics(6, CPU, products)
    statistics.add(fitted, None, weights)
    statistics.hold_out(held, None, weights)

    _, split = statistics.hessian()
    expected = (held[0] * weights[0, :, None]).T @ held[0] / 300
    assert float((split.held_out - expected).norm() / expected.norm()) < 4e-3


def test_what_is_held_out_counts_in_the_whole_and_apart():
    fitted, pair, held = (_random(1, 9, 6, seed=seed) for seed in range(3))
    statistics = InputStatistics(6, CPU)
    statistics.add_pair(pair, pair, None)
    statistics.add(fitted, None)
    statistics.hold_out(held, None)

    assert statistics.tokens == 27
    statistics.mismatch()
    hessian, split = statistics.hessian()

    first, other, last = (rows.flatten(0, 1).double() for rows in (fitted, pair, held))
    rest = torch.cat([first, other])
    every = torch.cat([rest, last])
    torch.testing.assert_close(hessian, every.T @ every / 27, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(split.fitted, (rest.T @ rest / 18).float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(split.held_out, (last.T @ last / 9).float(), rtol=1e-5, atol=1e-6)
