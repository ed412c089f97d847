"""What was not tested is worked out from the report: a fact there or not there decides about each sentence."""

from __future__ import annotations

from typing import Any

import pytest

from compress.reports.limits import limits
from compress.reports.report import Measurements, RoundTrip
from compress.reports.standing import Served, Standing

from .example import example_report, measurements, memory, provenance, task


def said(verdict: Any = "passed", **changes: Any) -> str:
    return " ".join(limits(example_report(verdict, **changes)))


def timed() -> Measurements:
    base = measurements()
    return base.model_copy(update={"compressed": {**base.compressed, "latency.decode_seconds": 0.01}})


def one_text() -> Measurements:
    base = measurements()
    kept = {name: value for name, value in base.compressed.items() if "rfc" not in name}
    return base.model_copy(update={"compressed": kept})


def trip(loader: str) -> RoundTrip:
    return RoundTrip(loader=loader, tokens=1, max_abs_logit_difference=0, mean_kl=0, bound=1, passed=True)


def window(tokens: int) -> list[dict[str, Any]]:
    return [{"name": "python-docs", "set": "python-docs", "window_tokens": tokens, "tokens_obtained": 40 * tokens}]


@pytest.mark.parametrize(
    ("sentence", "with_it", "without_it"),
    [
        ("has not earned release", {"verdict": "failed"}, {}),
        ("on one text only, python-docs", {"measurements": one_text()}, {}),
        ("Divergence from the source was not measured", {"measurements": {"source": {}, "compressed": {}}}, {}),
        ("noise floor was not measured", {"noise": []}, {}),
        ("Little text was read: python-docs (5,120 tokens)", {"evaluation": window(128)}, {"evaluation": window(512)}),
        ("No context beyond 512 tokens was evaluated", {"evaluation": window(512)}, {"evaluation": window(2048)}),
        ("No task benchmarks", {}, {"tasks": [task()]}),
        ("only those that capitals ask for", {"tasks": [task()]}, {}),
        ("217 of 300 of capitals", {"tasks": [task(available=300)]}, {"tasks": [task()]}),
        ("some of the wording of capitals", {"tasks": [task(overlap_with_calibration=0.1)]}, {"tasks": [task()]}),
        ("No text written by the model was looked at", {"answers": None}, {}),
        ("latency and throughput, was not measured", {}, {"measurements": timed()}),
        ("Speed was measured in transformers only", {"measurements": timed()}, {}),
        ("No serving runtime such as vLLM", {"round_trip": trip("transformers")}, {"round_trip": trip("vLLM 0.20")}),
        ("not reloaded through their public loader", {"round_trip": None}, {}),
        (
            "Everything was computed on a CPU in float32",
            {"provenance": {**provenance(), "machine": {"device": "cpu (x86_64)", "compute_dtype": "float32"}}},
            {"provenance": {**provenance(), "machine": {"device": "cuda (H100)", "compute_dtype": "bfloat16"}}},
        ),
        ("Memory of the KV cache is predicted, not measured", {}, {"memory": None}),
        ("came from a quantized file", {}, {"event_counts": {}}),
        ("calibrated on is not known", {"event_counts": {"calibration_unknown": 1}}, {}),
        ("bounded by no gate: rfc.text-2024", {}, {"measurements": one_text()}),
    ],
)
def test_a_sentence_is_said_where_its_fact_holds_and_only_there(
    sentence: str, with_it: dict[str, Any], without_it: dict[str, Any]
) -> None:
    if without_it == {"memory": None}:
        cache = memory().kv_cache.model_copy(update={"measured": 5.0})
        without_it = {"memory": memory().model_copy(update={"kv_cache": cache})}
    assert sentence in said(**with_it)
    assert sentence not in said(**without_it)


def test_what_was_served_since_is_not_told_as_missing() -> None:
    report = example_report(round_trip=trip("transformers"))
    served = Served("vLLM 0.32.0", "H100", 200, 0.002, 0.02, 0.999, 1.0, 900.0)

    before, after = (" ".join(limits(report, Standing(served=each))) for each in (None, served))

    assert "No serving runtime such as vLLM" in before and "No serving runtime" not in after
    assert "throughput, was not measured" in before and "the tokens a second of vLLM 0.32.0 are of one try" in after


def test_memory_reported_for_longer_contexts_than_were_read_is_named_with_what_the_model_declares() -> None:
    longer = memory().model_copy(update={"max_context": 8192})
    text = said(memory=longer, evaluation=window(512))
    assert "though memory is reported for 2,048 and the model declares 8,192." in text
