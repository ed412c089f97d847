"""How far a linear follows the source: against least squares on the held-out tokens themselves."""

from __future__ import annotations

import pytest
import torch

from compress.pruning.follow import followed
from compress.quantization.target_shift import Mismatch, Shift, shift_of


def moments(inputs, source, gap):
    """inputs, source (tokens, columns); gap (tokens, rows): what the residual stream lacks."""
    tokens = len(inputs)
    residual = None if gap is None else gap.T @ inputs / tokens
    return Mismatch(inputs.T @ inputs / tokens, (source - inputs).T @ inputs / tokens, residual, tokens)


def problem(noise, residual=True, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(tokens):
        inputs = torch.randn(tokens, 6, generator=generator, dtype=torch.float64)
        source = inputs + 0.3 * inputs @ bend + noise * torch.randn(tokens, 6, generator=generator).double()
        gap = inputs @ lack + noise * torch.randn(tokens, 4, generator=generator).double()
        return inputs, source, gap if residual else None

    bend = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    lack = 0.5 * torch.randn(6, 4, generator=generator, dtype=torch.float64)
    return torch.randn(4, 6, generator=generator), draw


@pytest.mark.parametrize("residual", [True, False])
def test_the_shares_are_the_best_multiples_on_held_out_tokens(residual):
    weight, draw = problem(1.0, residual)
    full = shift_of(moments(*draw(40)), 1.0, 1.0, 1e-6)
    inputs, source, gap = draw(4000)

    found = followed(weight, full, moments(inputs, source, gap))

    wanted = source @ weight.double().T + (0 if gap is None else gap) - inputs @ weight.double().T
    steps = [inputs @ (weight @ full.factor).double().T]
    steps += [] if full.offset is None else [inputs @ full.offset.double().T]
    best = torch.linalg.lstsq(torch.stack([step.flatten() for step in steps], 1), wanted.flatten().unsqueeze(1))
    expected = best.solution.flatten().clamp(0, 1).tolist()
    assert found.input_share == pytest.approx(expected[0], abs=1e-3)
    assert found.residual_share == pytest.approx(expected[1] if residual else 0.0, abs=1e-3)
    moved = found.input_share * weight @ full.factor
    moved = moved + (found.residual_share * full.offset if residual else 0)
    torch.testing.assert_close(found.target, weight + moved)
    assert 0 < found.input_share < 1


def test_what_holds_on_other_tokens_is_taken_whole_and_noise_is_not():
    weight, draw = problem(0.0)
    found = followed(weight, shift_of(moments(*draw(400)), 1.0, 1.0, 1e-9), moments(*draw(400)))
    assert found.input_share == pytest.approx(1, abs=1e-3) and found.residual_share == pytest.approx(1, abs=1e-3)

    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(30, 6, generator=generator).double()
    noise = moments(inputs, inputs, torch.randn(30, 4, generator=generator).double())
    others = torch.randn(4000, 6, generator=generator).double()
    judge = moments(others, others, torch.randn(4000, 4, generator=generator).double())
    found = followed(weight, shift_of(noise, 1.0, 1.0, 1e-9), judge)
    assert found.residual_share < 0.15 and found.input_share == 0


def test_the_example_of_the_docstring():
    full = Shift(torch.zeros(1, 1), torch.tensor([[0.2]]))
    one = torch.ones(1, 1, dtype=torch.float64)

    found = followed(torch.ones(1, 1), full, Mismatch(one, 0 * one, 0.1 * one, 10))

    assert found.residual_share == pytest.approx(0.5) and found.input_share == 0
    assert float(found.target) == pytest.approx(1.1)


def test_numbers_that_are_not_finite_move_nothing():
    full = Shift(torch.zeros(1, 1), torch.tensor([[0.2]]))
    bad = torch.full((1, 1), float("nan"), dtype=torch.float64)

    found = followed(torch.ones(1, 1), full, Mismatch(bad, bad, bad, 10))

    assert float(found.target) == 1 and found.residual_share == 0
