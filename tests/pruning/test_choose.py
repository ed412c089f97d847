"""Which pieces go: against exhaustive search, and against the textbook formula."""

from __future__ import annotations

import itertools

import pytest
import torch

from compress.pruning.choose import columns_of, kept_by_activation, kept_by_magnitude, kept_by_obs
from compress.pruning.refit import refitted

RIDGE = 1e-9


def problem(columns, rows=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    inputs = torch.randn(400, columns, generator=generator, dtype=torch.float64) @ mixing
    return torch.randn(rows, columns, generator=generator), inputs.T @ inputs / 400


def error_of_keeping(weight, hessian, kept):
    done = refitted(weight, hessian, kept, RIDGE)
    assert done is not None
    return done.error


@pytest.mark.parametrize("width", [1, 2])
def test_the_first_piece_to_go_is_the_one_whose_loss_is_best_made_up_for(width):
    weight, hessian = problem(8)
    pieces = range(8 // width)

    kept = kept_by_obs(weight, hessian, width, len(pieces) - 1, RIDGE)

    def error(gone):
        rest = torch.tensor([piece for piece in pieces if piece != gone])
        return error_of_keeping(weight, hessian, columns_of(rest, width))

    best = min(pieces, key=error)
    assert kept.tolist() == [piece for piece in pieces if piece != best]


def test_the_score_is_the_error_after_refitting():
    """tr(W_S (G_SS)^-1 W_S^T) is what refitting measures, so the greedy choice minimises the right thing."""
    weight, hessian = problem(6, seed=3)
    inverse = torch.linalg.inv(hessian)
    power = float((weight.double() @ hessian * weight).sum())
    for gone in range(6):
        rest = torch.tensor([column for column in range(6) if column != gone])
        score = float(weight[:, gone].double().square().sum() / inverse[gone, gone])
        assert error_of_keeping(weight, hessian, rest) == pytest.approx(score / power, rel=1e-5)


def test_greedy_is_near_the_best_of_all_subsets_and_better_than_the_other_scores():
    greedy, activation, magnitude = [], [], []
    for seed in range(12):
        weight, hessian = problem(10, seed=seed)
        every = [torch.tensor(kept) for kept in itertools.combinations(range(10), 6)]
        best = min(error_of_keeping(weight, hessian, kept) for kept in every)
        for found, kept in (
            (greedy, kept_by_obs(weight, hessian, 1, 6, RIDGE)),
            (activation, kept_by_activation(weight, hessian, 1, 6)),
            (magnitude, kept_by_magnitude(weight, torch.zeros(10), 1, 6)),
        ):
            found.append(error_of_keeping(weight, hessian, kept) / best)
    medians = [sorted(found)[6] for found in (greedy, activation, magnitude)]
    assert medians[0] < 1.3 and medians[0] < min(medians[1:]), medians


def test_an_update_forgets_what_went():
    """The downdated inverse is that of the columns that are left."""
    weight, hessian = problem(9, seed=4)
    kept, remaining = list(range(9)), weight.double()
    for _ in range(4):
        inverse = torch.linalg.inv(hessian[kept][:, kept])
        scores = remaining.square().sum(0) / inverse.diagonal()
        kept.pop(int(scores.argmin()))
        done = refitted(weight, hessian, torch.tensor(kept), RIDGE)
        remaining = done.weight.double()

    assert kept_by_obs(weight, hessian, 1, 5, RIDGE).tolist() == kept


def test_equal_channels_one_of_them_goes_first():
    weight, hessian = problem(6, seed=5)
    twin = torch.cat([hessian, hessian[2:3]])
    twin = torch.cat([twin, torch.cat([hessian[:, 2:3], hessian[2:3, 2:3]])], 1)
    weight = torch.cat([weight, weight[:, 2:3]], 1)

    kept = kept_by_obs(weight, twin, 1, 6, 1e-6)

    assert len({2, 6} & set(kept.tolist())) == 1 and len(kept) == 6


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_a_hessian_that_says_nothing_gives_none(value):
    assert kept_by_obs(torch.ones(2, 4), torch.full((4, 4), value, dtype=torch.float64), 1, 2, 0.01) is None


def test_weights_that_are_no_numbers_give_none_and_end():
    weight, hessian = problem(8)
    weight[0, 3] = float("nan")

    assert kept_by_obs(weight, hessian, 1, 4, RIDGE) is None


def test_plain_scores():
    weight = torch.tensor([[1.0, 0.0, 3.0, 2.0], [0.0, 4.0, 0.0, 0.0]])
    hessian = torch.diag(torch.tensor([100.0, 1.0, 1.0, 0.0], dtype=torch.float64))

    assert kept_by_activation(weight, hessian, 1, 2).tolist() == [0, 1]
    assert kept_by_magnitude(weight, torch.zeros(4), 1, 2).tolist() == [1, 2]
    assert kept_by_magnitude(weight, torch.tensor([9.0, 0.0, 0.0, 9.0]), 1, 2).tolist() == [0, 3]
    assert kept_by_activation(weight, hessian, 2, 1).tolist() == [0]
