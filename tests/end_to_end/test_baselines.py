"""The source's states are kept one file a set: another recipe reads those it shares, whatever it calls them."""

from __future__ import annotations

import json
from typing import Any

from tests.helpers import changed, write_recipe


def evaluations(texts: Any, **windows: int) -> list[dict[str, Any]]:
    data = {"kind": "files", "paths": [str(texts / "evaluation.jsonl")]}
    return [
        {"kind": "perplexity", "data": data, "set": name, "windows": count, "window_tokens": 64}
        for name, count in windows.items()
    ]


def test_a_set_that_another_recipe_measured_is_not_measured_again(glass_recipe, texts, here, tmp_path):
    def run(name: str, **windows: int) -> dict[str, Any]:
        recipe = changed(
            glass_recipe,
            name=name,
            calibration=None,
            stages=[{"kind": "round_to_nearest", "bits": 8, "group_size": "channel"}],
            evaluation=evaluations(texts, **windows),
            gates=[{"kind": "threshold", "measure": "weight_bytes", "max": 10**9}],
        )
        ended = here("run", write_recipe(tmp_path / "r.yaml", recipe), "--store", tmp_path / "store", "--json")
        assert ended.code == 0, ended.err
        return json.loads(ended.out)

    def reused(report: dict[str, Any]) -> list[str]:
        return [event["message"] for event in report["events"] if event["kind"] == "baseline_reused"]

    first = run("first", one=3, two=5)
    second = run("second", zwei=5, three=7)
    assert not reused(first)
    assert reused(second) == ["the source's hidden states on zwei came from the cache"]
    before, after = first["measurements"]["source"], second["measurements"]["source"]
    assert after["perplexity.zwei"] == before["perplexity.two"]
    assert after["perplexity.three"] not in before.values()
