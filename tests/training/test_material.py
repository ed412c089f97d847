"""Which windows train and which judge."""

from __future__ import annotations

import pytest
import torch

from compress.calibration.windows import Windows
from compress.errors import RecipeError
from compress.training.material import material
from tests.tiny import random_windows


def test_every_window_trains_once_an_epoch_or_is_kept_out():
    text = material(random_windows(count=16), None, 0.25, 3 * 24, seed=0)

    for epoch in range(2):
        batches = text.epoch(epoch, seed=0)
        assert [len(rows) for rows in batches] == [3, 3, 3, 3]
        assert sorted([*torch.cat(batches).tolist(), *text.held_out.tolist()]) == list(range(16))
    assert not torch.equal(torch.cat(text.epoch(0, 0)), torch.cat(text.epoch(1, 0)))
    assert torch.equal(torch.cat(text.epoch(1, 0)), torch.cat(text.epoch(1, 0)))


def test_windows_beside_the_calibration_text_train_and_never_judge():
    padded, more = random_windows(count=6, padded=True), random_windows(count=10, seed=1)

    text = material(padded, more, 0.5, 24, seed=0)

    assert len(text.held_out) == 3 and int(text.held_out.max()) < 6
    assert len(text.training) == 13
    assert text.tokens(torch.arange(6, 16)) == more.ids.numel()


def test_after_quantising_windows_that_no_stage_has_read_judge():
    """As many as before, so that `plan` counts steps without knowing which; where they are too few, they all train."""
    windows, more = random_windows(count=8), random_windows(count=10, seed=1)

    text = material(windows, more, 0.5, 24, seed=0, fitted=True)

    assert text.unseen and len(text.held_out) == 4 and int(text.held_out.min()) >= 8
    assert sorted([*text.training.tolist(), *text.held_out.tolist()]) == list(range(18))
    before = material(windows, more, 0.5, 24, seed=0)
    assert not before.unseen and len(before.training) == len(text.training)
    few = material(windows, random_windows(count=7, seed=1), 0.5, 24, seed=0, fitted=True)
    assert not few.unseen and int(few.held_out.max()) < 8 and len(few.training) == 11
    assert not material(windows, None, 0.5, 24, seed=0, fitted=True).unseen


def test_positions_whose_next_token_is_padding_do_not_count():
    ids = torch.arange(8).view(2, 4)
    text = material(Windows(ids, torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]), {}), None, 0.5, 4, seed=0)

    assert text.counts(torch.arange(2)).tolist() == [[True, True, False, False], [True, True, True, False]]


def test_a_single_window_cannot_be_split():
    with pytest.raises(RecipeError, match="keeps some windows out to judge by"):
        material(random_windows(count=1), None, 0.1, 24, seed=0)
