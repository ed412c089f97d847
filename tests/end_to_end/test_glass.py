"""Whole runs on glass: determinism, two runs at once, and an export that needs nothing of ours."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from compress.artifacts.verify import verify
from compress.calibration.windows import Windows
from tests.helpers import digest_of_newest, start_cli
from tests.tiny import load_publicly, our_logits, their_logits


def test_the_same_recipe_in_fresh_caches_gives_the_same_model_digest(recipe, here, tmp_path, monkeypatch):
    digests = []
    for name in ("first", "second"):
        monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / f"{name}-cache"))
        ended = here("run", recipe(), "--store", tmp_path / name, "--json")
        assert ended.code == 0, ended.err
        assert "stage_reused" not in json.loads(ended.out)["event_counts"]
        digests.append(digest_of_newest(tmp_path / name))

    assert digests[0] == digests[1]


def test_another_seed_gives_another_model(recipe, here, tmp_path):
    for seed in (0, 1):
        assert here("run", recipe(seed=seed), "--store", tmp_path / str(seed)).code == 0

    assert digest_of_newest(tmp_path / "0") != digest_of_newest(tmp_path / "1")


def test_a_rerun_reuses_the_finished_stage_and_says_so(recipe, here, tmp_path, monkeypatch):
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))
    assert here("run", recipe(), "--store", tmp_path / "store").code == 0
    ended = here("run", recipe(name="other"), "--store", tmp_path / "store", "--json")

    counts = json.loads(ended.out)["event_counts"]
    assert counts["stage_reused"] == 1 and counts["baseline_reused"] == 1
    assert digest_of_newest(tmp_path / "store", "other") == digest_of_newest(tmp_path / "store", "glass-int4")


def test_two_runs_at_once_into_one_store_both_publish(recipe, tmp_path):
    arguments = ("run", recipe(), "--store", tmp_path / "store")
    running = [start_cli(*arguments, env={"COMPRESS_CACHE": str(tmp_path / "cache")}) for _ in range(2)]
    for process in running:
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err

    folders = sorted((tmp_path / "store" / "glass-int4").glob("v*"))
    assert [folder.name for folder in folders] == ["v0001", "v0002"]
    assert all(verify(folder).ok for folder in folders)
    digests = {json.loads((folder / "manifest.json").read_text())["model_digest"] for folder in folders}
    assert len(digests) == 1
    assert list((tmp_path / "store" / ".staging").iterdir()) == []


def test_the_published_model_loads_with_plain_transformers_and_writes_the_text_it_was_judged_on(recipe, here, tmp_path):
    from transformers import AutoTokenizer

    ended = here("run", recipe(), "--store", tmp_path / "store", "--json")
    folder = tmp_path / "store" / "glass-int4" / "v0001" / "model"

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("Alice was beginning to get very tired of sitting by her sister", return_tensors="pt").input_ids
    windows = Windows(ids, None, {"layout": "packed"})
    torch.testing.assert_close(
        our_logits(folder, windows), their_logits(load_publicly(folder), windows), atol=1e-4, rtol=1e-4
    )
    report = json.loads(ended.out)
    assert report["round_trip"]["passed"] is True
    assert report["round_trip"]["mean_kl"] <= report["round_trip"]["bound"]
    assert report["gates"][-1]["measure"] == "round_trip.mean_kl"


def test_two_stages_in_a_row_are_folded_and_the_last_word_is_the_artifacts(recipe, here, tmp_path):
    stages = [
        {"kind": "round_to_nearest", "bits": 8, "group_size": "channel", "ignore": ["*.mlp.*"]},
        {"kind": "gptq", "bits": 4, "group_size": "channel", "ignore": ["*.self_attn.*"]},
    ]

    ended = here("run", recipe(stages=stages), "--store", tmp_path / "store", "--json")

    assert ended.code == 0, ended.err
    report = json.loads(ended.out)
    schemes = {module["name"]: module["scheme"] for stage in report["stages"] for module in stage["modules"]}
    assert schemes["model.layers.0.self_attn.q_proj"] == "int8 symmetric channel"
    assert schemes["model.layers.0.mlp.down_proj"] == "int4 symmetric channel"
    config = json.loads((tmp_path / "store" / "glass-int4" / "v0001" / "model" / "config.json").read_text())
    assert len(config["quantization_config"]["config_groups"]) == 2
    assert report["round_trip"]["passed"] is True


def test_a_recovered_model_is_published_with_what_training_did(recipe, here, glass_recipe, tmp_path):
    """In three bits, so that there is something to recover; the report says how it went."""
    gptq = {**glass_recipe["stages"][0], "bits": 3}
    measured = {}
    for name, stages in (("solved", [gptq]), ("recovered", [gptq, {"kind": "recover", "batch_tokens": 512}])):
        ended = here("run", recipe(name=name, stages=stages), "--store", tmp_path / "store", "--json")
        assert ended.code == 0, ended.err
        report = json.loads(ended.out)
        measured[name] = report["measurements"]["compressed"]["divergence.held-out.mean_kl"]

    assert measured["recovered"] < 0.99 * measured["solved"]
    assert report["round_trip"]["passed"] is True
    facts = report["stages"][1]["facts"]
    assert facts["held_out_kl_after"] < facts["held_out_kl_before"]
    page = (tmp_path / "store" / "recovered" / "v0001" / "reports" / "report.html").read_text()
    assert "What recover did" in page and "held out kl before" in page


def test_the_report_tells_of_linears_that_were_left_alone(recipe, here, tmp_path):
    stage = {"kind": "round_to_nearest", "bits": 8, "group_size": "channel", "ignore": ["*.o_proj", "*.0.mlp.*"]}
    path = recipe(stages=[stage], calibration=None)

    ended = here("run", path, "--store", tmp_path / "store", "--json")

    report = json.loads(ended.out)
    solved = {module["name"] for module in report["stages"][0]["modules"]}
    kept = {each["name"] for each in report["kept"]}
    assert kept and not kept & solved and {each["dtype"] for each in report["kept"]} == {"float16"}
    blocks = 1 + max(each["block"] for each in report["kept"])
    assert len(kept) == blocks + 3 and len(kept | solved) == 7 * blocks
    page = Path(report["artifact"]["path"], "reports", "report.html").read_text(encoding="utf-8")
    assert "model.layers.0.mlp.up_proj: float16, not quantised" in page


def test_the_model_can_calibrate_on_text_of_its_own(recipe, here, tmp_path):
    calibration = {"data": {"kind": "self-generated"}, "windows": 8, "window_tokens": 64}

    ended = here("run", recipe(calibration=calibration), "--store", tmp_path / "store", "--json")

    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["calibration"]["name"] == "self-generated"


def test_text_of_its_own_stands_beside_another_and_is_sampled_once(recipe, here, glass_recipe, tmp_path, monkeypatch):
    text = {**glass_recipe["calibration"], "windows": 8, "window_tokens": 64, "self_generated_windows": 4}
    path = recipe(calibration=text)
    ended = here("run", path, "--store", tmp_path / "store", "--json")
    assert ended.code == 0, ended.err
    ledger = json.loads(ended.out)["calibration"]
    assert ledger["windows_obtained"] == 12 and ledger["name"].endswith(" + self-generated")
    assert [each["windows_obtained"] for each in ledger["texts"]] == [8, 4]

    monkeypatch.setattr("compress.steps.sampled.sample_windows", None)
    again = here("run", path, "--store", tmp_path / "again", "--json")
    assert again.code == 0, again.err
    assert json.loads(again.out)["calibration"] == ledger
    assert json.loads(again.out)["event_counts"]["stage_reused"] == 1

    exported = here("export", "glass-int4", "--store", tmp_path / "store", "--format", "plain", "--json")
    assert exported.code == 0, exported.err
    assert json.loads(exported.out)["calibration"] == ledger, "of the making, and nothing is sampled for another format"

    judged = here("eval", tmp_path / "store" / "glass-int4" / "v0001", "--recipe", path, "--json")
    assert judged.code == 0, judged.err
    events = json.loads(judged.out)["events"]
    assert [event["message"] for event in events if event["kind"] == "calibration_unknown"] == [
        "what of its calibration text was sampled from the model was not sampled again"
    ]


def test_a_damaged_sampled_text_is_sampled_again_and_that_is_said(recipe, here, glass_recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))
    text = {**glass_recipe["calibration"], "windows": 8, "window_tokens": 64, "self_generated_windows": 4}
    path = recipe(calibration=text)
    first = json.loads(here("run", path, "--store", tmp_path / "store", "--json").out)
    (kept,) = (tmp_path / "cache" / "texts").glob("*.safetensors")
    for damage in (kept.read_bytes()[:100], b""):
        kept.write_bytes(damage)
        again = here("run", path, "--store", tmp_path / "again", "--json")
        assert again.code == 0, again.err
        report = json.loads(again.out)
        assert report["event_counts"]["sampled_again"] == 1
        assert report["calibration"]["digest"] == first["calibration"]["digest"]


def test_a_calibration_text_that_changed_is_noticed_beside_a_sampled_one(recipe, here, glass_recipe, tmp_path):
    source = tmp_path / "cal.jsonl"
    original = Path(glass_recipe["calibration"]["data"]["paths"][0]).read_text(encoding="utf-8")
    source.write_text(original, encoding="utf-8")
    data = {"kind": "files", "paths": [str(source)]}
    path = recipe(
        calibration={"data": data, "windows": 8, "window_tokens": 64, "self_generated_windows": 4}, name="changing"
    )
    assert here("run", path, "--store", tmp_path / "store").code == 0
    source.write_text("\n".join(reversed(original.strip().split("\n"))) + "\n", encoding="utf-8")
    judged = here("eval", tmp_path / "store" / "changing" / "v0001", "--recipe", path, "--json")
    assert judged.code == 0, judged.err
    said = [event["message"] for event in json.loads(judged.out)["events"] if event["kind"] == "calibration_unknown"]
    assert any("has changed since" in message for message in said), said


def test_fewer_calibration_windows_than_asked_is_an_event_a_gate_can_bound(recipe, here, glass_recipe, tmp_path):
    calibration = {**glass_recipe["calibration"], "windows": 4000}
    gates = [{"kind": "events", "event": "calibration_shortfall", "max": 0}]

    ended = here("run", recipe(calibration=calibration, gates=gates), "--store", tmp_path / "store", "--json")

    assert ended.code == 3
    report = json.loads(ended.out)
    assert report["event_counts"]["calibration_shortfall"] == 1
    assert report["calibration"]["windows_obtained"] < report["calibration"]["windows_requested"] == 4000


def test_a_plain_export_holds_the_same_values_in_sixteen_bits(recipe, here, tmp_path):
    export = {"format": "plain", "context": 128}

    assert here("run", recipe(export=export, name="plain"), "--store", tmp_path / "store").code == 0
    assert here("run", recipe(), "--store", tmp_path / "store").code == 0

    windows = Windows(torch.arange(4, 100).view(2, 48), None, {"layout": "packed"})
    plain, packed = (tmp_path / "store" / name / "v0001" / "model" for name in ("plain", "glass-int4"))
    torch.testing.assert_close(our_logits(plain, windows), our_logits(packed, windows), atol=0, rtol=0)


def test_a_sharded_export_is_found_and_read_by_transformers(recipe, here, tmp_path):
    export = {"format": "plain", "max_shard_bytes": 1_000_000}

    ended = here("run", recipe(export=export), "--store", tmp_path / "store", "--json")

    assert ended.code == 0, ended.err
    model = tmp_path / "store" / "glass-int4" / "v0001" / "model"
    assert len(list(model.glob("model-*-of-*.safetensors"))) == 2
    assert json.loads(ended.out)["round_trip"]["passed"] is True


def test_an_asymmetric_model_survives_its_public_loader(recipe, here, tmp_path):
    stages = [{"kind": "gptq", "bits": 4, "symmetric": False, "group_size": "channel"}]

    ended = here("run", recipe(stages=stages), "--store", tmp_path / "store", "--json")

    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["round_trip"]["passed"] is True
