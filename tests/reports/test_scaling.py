"""Facts over blocks in a line for each kind of place."""

from __future__ import annotations

from compress.reports.scaling import summary


def test_places_are_summed_up_by_what_writes_their_channels():
    places = [
        {"block": 0, "writer": "input_layernorm", "alpha": 0.5, "error_ratio": 0.4},
        {"block": 1, "writer": "input_layernorm", "alpha": None, "error_ratio": 1.0},
        {"block": 0, "writer": "mlp.up_proj", "alpha": None, "error_ratio": 1.0},
    ]

    assert summary({"places": places, "kept": 1}) == {
        "kept": 1,
        "input_layernorm": "scaled in 1 of 2 blocks, median alpha 0.5, error of rounded outputs 0.70 times as large",
        "mlp.up_proj": "scaled in 0 of 1 blocks",
    }


def test_largest_keys_and_values_are_a_range():
    largest = [{"block": 0, "keys": 3.0, "values": 0.5}, {"block": 1, "keys": 12.5, "values": 0.25}]

    assert summary({"per": "head", "largest": largest}) == {
        "per": "head",
        "largest keys": "3 to 12.5, by block",
        "largest values": "0.25 to 0.5, by block",
    }


def test_other_facts_stay_as_they_are():
    assert summary({"anything": [1, 2]}) == {"anything": [1, 2]}
