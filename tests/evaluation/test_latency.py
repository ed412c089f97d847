"""Two models by turns: what is slower is found, what is equal is not."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch

from compress.evaluation.latency.spec import Latency
from compress.evaluation.latency.turns import measure, take_turns
from compress.evaluation.measure import Measured


class Sleeper:
    """A model that takes its time."""

    device = torch.device("cpu")

    def __init__(self, a_token: float) -> None:
        self.a_token, self.calls = a_token, 0

    def __call__(self, ids: torch.Tensor, **_: object) -> SimpleNamespace:
        self.calls += 1
        time.sleep(self.a_token * ids.shape[1])
        return SimpleNamespace(logits=torch.zeros(*ids.shape, 5), past_key_values=None)


def test_a_model_that_takes_twice_as_long_is_found_in_both_parts():
    spec = Latency(prompt_tokens=20, new_tokens=3, repeats=5)
    slow, fast = Sleeper(0.004), Sleeper(0.002)
    source, compressed = Measured(), Measured()
    measure(take_turns(spec, fast, slow, 5), source, compressed)
    assert slow.calls == fast.calls == (spec.repeats + 1) * (1 + spec.new_tokens)
    for part, seconds in (("prefill", 0.08), ("decode", 0.004)):
        name = f"latency.{part}_seconds"
        assert compressed.values[name] == pytest.approx(seconds, rel=0.3)
        low, high = compressed.ratio_intervals[name]
        assert low > 1.4 and high < 2.8


def test_a_run_measures_both_and_is_judged(here, recipe, glass_recipe, tmp_path):
    import json

    evaluation = [*glass_recipe["evaluation"], {"kind": "latency", "prompt_tokens": 16, "new_tokens": 4, "repeats": 4}]
    gates = [
        {"kind": "latency", "what": "prefill", "max_seconds": 60},
        {"kind": "latency", "what": "decode", "max_ratio": 0.001, "tier": "advisory"},
    ]
    path = recipe(evaluation=evaluation, gates=gates)
    ended = here("run", path, "--store", tmp_path / "store", "--json")
    assert ended.code == 0, ended.err
    report = json.loads(ended.out)
    assert [gate["verdict"] for gate in report["gates"][:2]] == ["passed", "failed"]
    for side in ("source", "compressed"):
        assert 0 < report["measurements"][side]["latency.decode_seconds"] < 10


def test_a_gate_on_time_needs_time_to_be_measured(here, recipe):
    ended = here("validate", recipe(gates=[{"kind": "latency", "max_ratio": 1.1}]))
    assert ended.code == 2 and "nothing measures 'latency.decode_seconds'" in ended.err
