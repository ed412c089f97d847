"""`compress run` as a user sees it: what is printed, what is left on disk, and the exit code."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import yaml

from tests.helpers import digest_of_newest, start_cli


def test_a_passing_run_ends_with_0_and_says_where_the_report_is(recipe, here, tmp_path):
    ended = here("run", recipe(), "--store", tmp_path / "store")

    assert ended.code == 0, ended.err
    artifact = tmp_path / "store" / "glass-int4" / "v0001"
    assert f"PASSED published as {artifact}" in ended.out
    assert f"report: {artifact / 'reports' / 'report.html'}" in ended.out
    assert "plan: stored" in ended.err


def test_a_published_artifact_holds_everything_the_readme_promises(published):
    artifact = published[0] / "glass-int4" / "v0001"

    for name in ("manifest.json", "recipe.yaml", "model/model.safetensors", "model/config.json", "model/README.md"):
        assert (artifact / name).stat().st_size > 0
    for name in ("report.json", "report.html", "report.md", "junit.xml", "events.jsonl"):
        assert (artifact / "reports" / name).exists()


def test_json_prints_one_document_and_nothing_else(published):
    store, printed = published

    report = json.loads(printed)
    assert report["verdict"] == "passed"
    assert report == json.loads((store / "glass-int4" / "v0001" / "reports" / "report.json").read_text())


def test_the_report_holds_every_field_that_scripts_rely_on(published):
    report = json.loads(published[1])

    assert report["schema"] == 1
    assert {"kind", "measure", "observed", "interval", "limit", "verdict", "sentence"} <= set(report["gates"][0])
    compressed = report["measurements"]["compressed"]
    for name in ("mean_kl", "median_kl", "kl_p99", "kl_p999", "top1_agreement"):
        assert f"divergence.held-out.{name}" in compressed
    assert compressed["perplexity.held-out"] > 0 and report["measurements"]["source"]["perplexity.held-out"] > 0
    for quantity in ("stored", "resident", "kv_cache", "peak_host"):
        assert report["memory"][quantity]["predicted"] > 0 and report["memory"][quantity]["measured"] > 0
    (stage,) = report["stages"]
    assert stage["weight_bytes_before"] > stage["weight_bytes_after"] > 0
    assert len(stage["modules"]) == 28
    assert {"name", "scheme", "error", "damping", "seconds", "events"} <= set(stage["modules"][0])
    assert report["artifact"]["version"] == "v0001" and report["artifact"]["digest"]


def test_stored_bytes_are_predicted_exactly(published):
    stored = json.loads(published[1])["memory"]["stored"]

    assert stored["predicted"] == stored["measured"]


def test_a_failed_gate_ends_with_3_and_the_run_is_kept_as_rejected_with_its_report(rejected, here):
    store, report = rejected

    folder = store / "glass-int4" / "rejected" / "r0001"
    assert report["verdict"] == "failed"
    assert json.loads((folder / "reports" / "report.json").read_text()) == report
    assert json.loads((folder / "manifest.json").read_text())["verdict"] == "failed"
    assert not list((store / "glass-int4").glob("v*"))
    shown = here("show", "glass-int4", "--store", store)
    assert shown.code == 2
    assert 'No version of "glass-int4" has passed its gates. The newest rejected run is glass-int4@r0001.' in shown.err


def test_a_bound_inside_the_interval_ends_with_4_when_the_gate_asks_for_certainty(recipe, here, published, tmp_path):
    observed = json.loads(published[1])["measurements"]["compressed"]["perplexity.held-out"]
    gate = {"kind": "threshold", "measure": "perplexity.held-out", "max": observed, "use_interval": True}

    ended = here("run", recipe(gates=[gate]), "--store", tmp_path / "store")

    assert ended.code == 4
    assert "INCONCLUSIVE kept, not published, as" in ended.out
    assert (tmp_path / "store" / "glass-int4" / "rejected" / "r0001" / "manifest.json").is_file()


def test_set_overrides_one_value_and_is_recorded_in_the_stored_recipe(recipe, here, tmp_path):
    ended = here("run", recipe(), "--store", tmp_path / "store", "--set", "stages.0.bits=8", "--set", "name=other")

    assert ended.code == 0, ended.err
    stored = yaml.safe_load((tmp_path / "store" / "other" / "v0001" / "recipe.yaml").read_text())
    assert stored["stages"][0]["bits"] == 8


def test_the_stored_recipe_runs_again_to_the_same_bytes(published, here, tmp_path):
    stored = published[0] / "glass-int4" / "v0001" / "recipe.yaml"

    ended = here("run", stored, "--store", tmp_path / "again")

    assert ended.code == 0, ended.err
    assert digest_of_newest(tmp_path / "again") == digest_of_newest(published[0])


def test_rounding_needs_no_calibration_text(recipe, here, tmp_path):
    stages = [{"kind": "round_to_nearest", "bits": 8, "group_size": "channel"}]

    ended = here("run", recipe(stages=stages, calibration=None), "--store", tmp_path / "store", "--json")

    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["calibration"]["name"] is None


def test_ctrl_c_ends_with_130_and_the_same_command_then_gives_the_same_bytes(recipe, here, published, tmp_path):
    cache = tmp_path / "cache"
    arguments = ("run", recipe(), "--store", tmp_path / "store")
    running = start_cli(*arguments, env={"COMPRESS_CACHE": str(cache)})
    _wait_for(lambda: list(cache.glob("stages/*/block-00000.json")), running)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=60)

    assert running.returncode == 130, err
    assert "interrupted. Finished blocks are kept: the same command goes on where this one stopped." in err
    assert "Traceback" not in err
    assert _leftovers(tmp_path / "store") == []

    env = {"COMPRESS_CACHE": str(cache)}
    again = start_cli(*arguments, "--json", env=env)
    out, err = again.communicate(timeout=300)
    assert again.returncode == 0, err
    assert json.loads(out)["event_counts"]["blocks_resumed"] == 1
    assert digest_of_newest(tmp_path / "store") == digest_of_newest(published[0])


def _wait_for(condition, process, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.005)


def _leftovers(store: Path) -> list[Path]:
    return [path for path in store.rglob("*") if path.is_file() and path.name != ".lock"]


def test_an_export_too_large_to_reload_is_said_to_be_so(recipe, here, tmp_path, monkeypatch):
    monkeypatch.setattr("compress.memory.measure.available_bytes", lambda: 400 * 2**20)

    ended = here("run", recipe(), "--store", tmp_path / "store", "--json")

    report = json.loads(ended.out)
    assert ended.code == 0 and report["round_trip"] is None
    assert report["event_counts"]["round_trip_skipped"] == 1
