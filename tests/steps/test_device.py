"""Predicted memory of a GPU: the worst stage decides, a remedy is offered where it helps, what is unknown is None."""

from __future__ import annotations

import pytest
import torch

from compress.memory.predict import calibration_device_bytes
from compress.recipe import Recipe
from compress.steps import device
from compress.steps.device import device_peaks
from compress.steps.environment import Machine
from tests.tiny import load_of_8b

GPU = Machine(torch.device("cuda"), torch.bfloat16, 16384)
TOKENS = 128 * 2048


def load_of(recipe):
    streams = max((stage.activation_streams for stage in recipe.stages), default=0)
    replays = all(stage.replays for stage in recipe.stages if stage.activation_streams)
    return load_of_8b(streams, replays, any(stage.refines for stage in recipe.stages))


def recipe(*stages):
    return Recipe.model_validate(
        {
            "schema": 1,
            "name": "x",
            "model": {"path": "/x"},
            "calibration": {"data": "python-help", "windows": 128, "window_tokens": 2048},
            "stages": list(stages),
            "evaluation": [{"kind": "perplexity", "data": "python-docstrings", "windows": 2, "window_tokens": 64}],
            "gates": [{"kind": "events", "event": "rounding_fallback"}],
        }
    )


@pytest.fixture
def card(monkeypatch):
    """A card of so many GiB."""

    def of(gib):
        monkeypatch.setattr(device, "free_bytes", lambda _: gib * 2**30)
        monkeypatch.setattr(device, "fits", lambda parameters, *_: parameters * 4 < 0.8 * gib * 2**30)

    return of


def test_low_memory_is_offered_where_it_helps_and_gone_once_it_is_set(card):
    card(24)
    held = device_peaks(recipe({"kind": "gptq"}), load_of, GPU)
    replayed = device_peaks(recipe({"kind": "gptq", "low_memory": True}), load_of, GPU)

    assert "low_memory: true" in held.shortage(GPU) and f"{held.calibrating:,} bytes" in held.shortage(GPU)
    assert replayed.shortage(GPU) is None and replayed.run == replayed.calibrating
    assert held.pinned == 0 and replayed.pinned == pytest.approx(1.5 * TOKENS * 4096 * 2, rel=0.01)
    card(8)
    replayed = device_peaks(recipe({"kind": "gptq", "low_memory": True}), load_of, GPU)
    assert "low_memory" not in replayed.shortage(GPU) and "larger GPU" in replayed.shortage(GPU)


def test_each_stage_counts_for_itself(card):
    """smoothquant holds one stream whatever gptq does: setting low_memory leaves that, and only that."""
    card(80)
    both = recipe({"kind": "smoothquant"}, {"kind": "gptq"})
    found = device_peaks(both, load_of, GPU)

    alone = calibration_device_bytes(load_of(recipe({"kind": "smoothquant"})), 16384)
    assert found.in_low_memory == alone < found.calibrating
    assert found.run == max(found.calibrating, 8_030_261_248 * 4), "the reload in float32 is in it"


def test_what_is_not_predicted_is_not_claimed(card):
    card(80)
    assert device_peaks(recipe({"kind": "gptq"}, {"kind": "recover"}), load_of, GPU).run is None
    assert device_peaks(recipe({"kind": "gptq"}), load_of, Machine(torch.device("cpu"), torch.float32, 1024)) is None
