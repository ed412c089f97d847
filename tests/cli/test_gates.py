"""Gates that weigh noise, from the recipe to the report."""

from __future__ import annotations

import json

import pytest

PERPLEXITY, KL = "perplexity.held-out", "divergence.held-out.mean_kl"


def test_a_run_is_judged_by_paired_windows_with_size_and_memory(recipe, here, tmp_path):
    gates = [
        {"kind": "non_inferiority", "measure": PERPLEXITY, "margin": 0.5},
        {"kind": "non_inferiority", "measure": KL, "margin": 0.5},
        {"kind": "size", "max_ratio": 0.9, "max_effective_bits": 5},
        {"kind": "memory", "what": "serving", "max_bytes": 10**8},
        {"kind": "non_inferiority", "measure": PERPLEXITY, "margin": 1e-6, "tier": "advisory"},
    ]
    ended = here("run", recipe(gates=gates), "--store", tmp_path / "store", "--json")

    assert ended.code == 0, ended.err
    judged = json.loads(ended.out)["gates"]
    assert [gate["verdict"] for gate in judged[:4]] == ["passed"] * 4
    assert judged[4]["tier"] == "advisory" and judged[4]["verdict"] != "passed"
    assert judged[0]["units"] == 8 and judged[0]["p_within"] < 0.05
    low, high = judged[0]["interval"]
    assert low < judged[0]["observed"] < high < 0.5


def test_a_run_with_too_few_windows_for_its_margin_ends_undecided(recipe, here, tmp_path):
    compared = {"kind": "non_inferiority", "measure": PERPLEXITY, "margin": 0.005, "alpha": 0.001}
    ended = here("run", recipe(gates=[compared]), "--store", tmp_path / "store")

    assert ended.code == 4, ended.err
    assert "inconclusive" in ended.out


def test_plan_says_what_a_gate_can_decide_and_warns_where_it_cannot(recipe, here, tmp_path):
    gates = [
        {"kind": "non_inferiority", "measure": PERPLEXITY, "margin": 0.5},
        {"kind": "non_inferiority", "measure": PERPLEXITY, "margin": 0.001},
    ]
    planned = recipe(gates=gates)
    shown = here("plan", planned, "--store", tmp_path / "store")
    printed = json.loads(here("plan", planned, "--store", tmp_path / "store", "--json").out)

    assert shown.code == 0, shown.err
    assert "8 windows of 128 tokens" in shown.out and "expect inconclusive" in shown.out
    wide, narrow = printed["gate_power"]
    assert wide["power"] > 0.99 > 0.1 > narrow["power"]
    # (1.645 + 0.842) sqrt(2 x 0.05 / 1024) nats
    assert wide["smallest_margin"] == pytest.approx(0.0249, abs=2e-4)


def test_plan_asks_whether_a_margin_of_several_hundred_percent_is_meant(recipe, here, tmp_path):
    ended = here("plan", recipe(gates=[{"kind": "non_inferiority", "measure": PERPLEXITY, "margin": 5}]))
    assert ended.code == 0 and "500 % more perplexity" in ended.out and "is 0.05 meant" in ended.out.replace("\n", " ")


def test_plan_says_how_near_to_a_bound_on_kl_a_model_may_come(recipe, here, tmp_path):
    planned = recipe(gates=[{"kind": "non_inferiority", "measure": KL, "margin": 0.1}])
    (power,) = json.loads(here("plan", planned, "--store", tmp_path / "store", "--json").out)["gate_power"]
    # 0.1 / (1 + (1.645 + 0.842) 0.3 / sqrt(8))
    assert power["largest_passing"] == pytest.approx(0.0791, abs=1e-4) and power["smallest_margin"] is None
    assert "pass a model up to 0.0791 nats" in here("plan", planned, "--store", tmp_path / "store").out


@pytest.mark.parametrize(
    ("gate", "said"),
    [
        ({"kind": "non_inferiority", "measure": PERPLEXITY, "margin": 0}, "must be above 0"),
        ({"kind": "non_inferiority", "measure": "weight_bytes", "margin": 0.1}, "not compared item by item"),
        ({"kind": "non_inferiority", "measure": "perplexity.other", "margin": 0.1}, "nothing measures"),
        ({"kind": "size"}, "judges nothing"),
        ({"kind": "threshold", "measure": KL, "max": 1, "tier": "advisory"}, "no gate is critical"),
        ({"kind": "threshold", "measure": KL, "max": 1, "tier": "crucial"}, "tier"),
    ],
)
def test_gates_that_could_never_judge_are_refused_before_work_starts(gate, said, recipe, here, tmp_path):
    ended = here("run", recipe(gates=[gate]), "--store", tmp_path / "store")

    assert ended.code == 2
    assert said in ended.err
