"""How much of training is kept in memory, from shapes and what is free."""

from __future__ import annotations

from dataclasses import replace

import pytest

from compress.memory import predict
from compress.training import footprint
from compress.training.trained import Trainable
from tests.tiny import CPU

LOAD = predict.TrainingLoad(
    quantised=30 * 10**6,
    dense=10**5,
    trained=10**6,
    block_parameters=10**6,
    block_width=10_000,
    blocks=30,
    hidden=576,
    vocabulary=49_152,
    batch_tokens=2_048,
    kept_tokens=65_536,
    compute_bytes=4,
)


CODES = replace(LOAD, trained=LOAD.trained + LOAD.quantised)


def chosen(monkeypatch, free, load=LOAD, asked="auto", what="scales+norms"):
    """What is chosen where training codes takes `CODES` and everything else `load`."""
    monkeypatch.setattr(footprint, "free_bytes", lambda device: free)
    return footprint.choose(asked, Trainable(what), lambda trained: CODES if trained.what == "codes" else load, CPU)


def test_the_inside_of_every_block_is_kept_where_memory_abounds(monkeypatch):
    choice = chosen(monkeypatch, 64 * 10**9)

    assert (choice.mode, choice.kept_blocks) == ("model", 30)
    more = predict.whole_model_training_bytes(LOAD, 30) - predict.whole_model_training_bytes(LOAD)
    assert more == 30 * predict.inside_bytes(LOAD)


def test_no_more_than_a_quarter_of_free_memory_goes_to_it(monkeypatch):
    free = 4 * 10**9
    choice = chosen(monkeypatch, free)

    assert 0 < choice.kept_blocks < 30
    assert choice.kept_blocks * predict.inside_bytes(LOAD) <= free / 4
    assert (choice.kept_blocks + 1) * predict.inside_bytes(LOAD) > free / 4


@pytest.mark.parametrize("case", ["no room", "scores of attention", "one block at a time"])
def test_nothing_is_kept(monkeypatch, case):
    """Where the whole only just fits, where attention would leave its scores, where blocks are trained one by one."""
    whole = predict.whole_model_training_bytes(LOAD)
    if case == "no room":
        assert chosen(monkeypatch, int(whole / 0.79)).kept_blocks == 0
    elif case == "scores of attention":
        assert chosen(monkeypatch, 64 * 10**9, replace(LOAD, fused_attention=False)).kept_blocks == 0
    else:
        assert chosen(monkeypatch, int(whole / 0.9)) == footprint.Choice(
            "block", "scales+norms", whole, int(whole / 0.9), 0
        )


def test_scales_are_trained_where_codes_do_not_fit(monkeypatch):
    """Unless the recipe asks for a mode: then codes are trained in that."""
    codes, scales = (predict.whole_model_training_bytes(load) for load in (CODES, LOAD))
    between = (codes + scales) // 2

    assert chosen(monkeypatch, 2 * codes, what="codes").train == "codes"
    choice = chosen(monkeypatch, between, what="codes")
    assert (choice.mode, choice.train, choice.whole_model_bytes) == ("model", "scales+norms", scales)
    assert chosen(monkeypatch, scales, what="codes").mode == "block"
    for mode in ("model", "block"):
        asked = chosen(monkeypatch, between, what="codes", asked=mode)
        assert (asked.mode, asked.train) == (mode, "codes")
