"""A second run says what changed against the first: what production leads to, else the newest that passed."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.test_report import promote


def report_of(folder: Path) -> dict:
    return json.loads((folder / "reports" / "report.json").read_text(encoding="utf-8"))


def test_a_run_is_compared_with_the_release_before_it(recipe, glass_recipe, here, tmp_path):
    store = tmp_path / "store"
    stage = glass_recipe["stages"][0]
    for bits in (8, 4):
        assert here("run", recipe(stages=[{**stage, "bits": bits}]), "--store", store).code == 0
    promote(store, "v0001")
    gates = [{"kind": "threshold", "measure": "divergence.held-out.mean_kl", "max": 1e-4}]
    assert here("run", recipe(stages=[{**stage, "bits": 2}], gates=gates), "--store", store).code == 3

    first, second = (report_of(store / "glass-int4" / label) for label in ("v0001", "v0002"))
    failed = report_of(store / "glass-int4" / "rejected" / "r0001")
    assert first["previous"] is None
    assert (second["previous"]["version"], second["previous"]["chosen"]) == (
        "v0001",
        "the newest version that had passed",
    )
    assert second["previous"]["recipe"] == [{"path": "stages.0.bits", "previous": "8", "current": "4"}]
    assert second["previous"]["linears_changed"] == 28 and second["previous"]["comparable"]

    found = failed["previous"]
    assert (found["version"], found["chosen"]) == ("v0001", "which production leads to")
    mean = next(each for each in found["measures"] if each["name"] == "divergence.held-out.mean_kl")
    assert mean["previous"] < mean["current"] and mean["overlap"] is False
    assert found["weight_bytes"][0] > found["weight_bytes"][1]
    page = (store / "glass-int4" / "rejected" / "r0001" / "reports" / "report.html").read_text(encoding="utf-8")
    assert "Against v0001, which production leads to" in page and "Recipe fields that differ" in page

    points = {(each["context"], each["concurrency"]): each["kv_cache_bytes"] for each in second["memory"]["serving"]}
    assert points[128, 1] == second["memory"]["kv_cache"]["predicted"]
    assert points[64, 4] == 2 * points[128, 1] and second["memory"]["max_context"] == 128
    assert any("on one text only, held-out" in each for each in second["limits"])


def test_the_card_of_a_run_carries_the_licence_of_its_source(recipe, glass, here, tmp_path):
    import shutil

    from huggingface_hub import ModelCard

    source = tmp_path / "source"
    shutil.copytree(glass, source)
    (source / "README.md").write_text("---\nlicense: mit\nlanguage: en\n---\n# Glass\n")
    ended = here("run", recipe(model={"path": str(source)}), "--store", tmp_path / "store")
    assert ended.code == 0, ended.err
    folder = tmp_path / "store" / "glass-int4" / "v0001" / "model"
    data = ModelCard.load(folder / "README.md").data
    assert (data.license, data.language) == ("mit", ["en"])
    assert {"compressed-tensors", "4-bit"} <= set(data.tags)
    assert "base_model" not in data.to_dict()
