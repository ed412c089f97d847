"""records.jsonl: its shape, and that the examples for MLflow and W&B ship it."""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from compress.reports.records import records
from compress.reports.report import Measurements
from compress.reports.write import write_report
from tests.helpers import PROJECT

from .example import DIGEST, example_report, hostile_report

EXAMPLES = PROJECT / "scripts" / "examples"
KEYS = {
    "run": {"name", "version", "digest", "started", "seconds"},
    "param": {"name", "value"},
    "metric": {"name", "value"},
    "stage": {
        *("index", "kind", "seconds", "reused"),
        *("weight_bytes_before", "weight_bytes_after", "seconds_by_part"),
    },
    "gate": {"kind", "measure", "observed", "limit", "verdict", "tier"},
    "event": {"kind", "where", "message"},
    "verdict": {"verdict", "sentence"},
}


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    write_report(example_report("failed"), tmp_path / "reports")
    return tmp_path


def lines(artifact: Path) -> list[dict[str, Any]]:
    text = (artifact / "reports" / "records.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_every_line_has_the_keys_of_its_type_in_the_order_told(artifact: Path) -> None:
    found = lines(artifact)
    assert list(dict.fromkeys(record["type"] for record in found)) == list(KEYS)
    for record in found:
        assert set(record) - {"type", "low", "high"} == KEYS[record["type"]]
        assert not {"low", "high"} & set(record) or record["type"] == "metric"
    assert found[0]["digest"] == DIGEST and found[-1]["verdict"] == "failed"


def test_parameters_metrics_and_intervals_are_those_of_the_report(artifact: Path) -> None:
    found = lines(artifact)
    params = {record["name"]: record["value"] for record in found if record["type"] == "param"}
    metrics = {record["name"]: record for record in found if record["type"] == "metric"}
    assert params["stages.0.bits"] == "4" and params["calibration.windows"] == "128"
    mean = metrics["compressed.divergence.python-docs.mean_kl"]
    assert (mean["value"], mean["low"], mean["high"]) == (0.0614, 0.0583, 0.0647)
    assert metrics["source.weight_bytes"]["value"] == 269_030_528
    assert metrics["memory.stored.predicted"]["value"] == 102_700_000
    assert "memory.peak_device.measured" not in metrics


def test_numbers_that_json_does_not_know_are_texts_that_float_reads() -> None:
    odd = Measurements(source={}, compressed={"perplexity.x": float("inf"), "divergence.x.mean_kl": float("nan")})
    text = "".join(json.dumps(record, allow_nan=False) for record in records(example_report(measurements=odd)))
    assert '"Infinity"' in text and '"NaN"' in text and float("Infinity") == float("inf")


def test_hostile_text_stays_one_record_a_line(tmp_path: Path) -> None:
    write_report(hostile_report(), tmp_path / "reports")
    assert lines(tmp_path)[-1]["type"] == "verdict"


def example(name: str, monkeypatch: pytest.MonkeyPatch, module: types.ModuleType) -> Any:
    monkeypatch.setitem(sys.modules, module.__name__, module)
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def test_the_mlflow_example_ships_it(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    @contextmanager
    def start_run(run_name: str) -> Any:
        calls.append(("start_run", run_name))
        yield
        calls.append(("end_run",))

    mlflow: Any = types.ModuleType("mlflow")
    mlflow.start_run = start_run
    for name in ("set_experiment", "log_param", "log_metric", "set_tags", "log_artifact"):
        setattr(mlflow, name, lambda *arguments, name=name: calls.append((name, *arguments)))
    example("to_mlflow", monkeypatch, mlflow).ship(artifact)

    assert calls[:2] == [("set_experiment", "smollm2-w4"), ("start_run", "v0003")]
    assert ("log_param", "stages.0.bits", "4") in calls
    assert ("log_metric", "compressed.divergence.python-docs.mean_kl", 0.0614) in calls
    assert ("log_metric", "stage.0.gptq.seconds", 131.4) in calls
    assert ("set_tags", {"verdict": "failed", "model_digest": DIGEST}) in calls
    assert calls[-2:] == [("log_artifact", str(artifact / "reports" / "report.html")), ("end_run",)]


def test_the_wandb_example_ships_it(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Run:
        def __init__(self) -> None:
            self.summary: dict[str, Any] = {}
            self.logged: dict[str, Any] = {}

        def log(self, values: dict[str, Any]) -> None:
            self.logged |= values

    run, asked = Run(), {}

    @contextmanager
    def init(**arguments: Any) -> Any:
        asked.update(arguments)
        yield run

    wandb: Any = types.ModuleType("wandb")
    wandb.init, wandb.Html = init, lambda page, inject: page
    example("to_wandb", monkeypatch, wandb).ship(artifact)

    assert (asked["project"], asked["name"], asked["config"]["stages.0.bits"]) == ("smollm2-w4", "v0003", "4")
    assert run.summary["compressed.weight_bytes"] == 102_760_448 and run.summary["verdict"] == "failed"
    assert "<html" in run.logged["report"]
