"""The model card's front matter as hub tools read it, and its text."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from compress.reports.card import model_card
from compress.reports.report import Measurements, Report

from .example import example_report, hostile_report, measurements, provenance


def front_matter(report: Report) -> dict[str, Any]:
    text = model_card(report)
    assert text.startswith("---\n")
    data = yaml.safe_load(text.split("---\n")[1])
    assert isinstance(data, dict)
    return data


def with_source(**source: Any) -> Report:
    return example_report(provenance={**provenance(), "source": source})


def test_the_hub_reads_every_measurement() -> None:
    data: Any = ModelCard(model_card(example_report())).data
    assert data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert data.license == "apache-2.0"
    assert {"gptq", "int4", "quantized"} <= set(data.tags or [])
    read = {(result.dataset_name, result.metric_type): result.metric_value for result in data.eval_results or []}
    wanted = measurements().compressed
    assert read["python-docs", "perplexity"] == wanted["perplexity.python-docs"]
    assert read["rfc.text-2024", "kl_p999"] == wanted["divergence.rfc.text-2024.kl_p999"]
    assert len(read) == 12


@pytest.mark.parametrize("source", [{}, {"id": "/models/local"}, {"id": "a/b/c"}, {"id": "<x>/y"}, {"id": 3}])
def test_a_source_that_is_no_hub_id_is_not_named_as_one(source: dict[str, Any]) -> None:
    assert "base_model" not in front_matter(with_source(**source))


def test_an_unknown_licence_is_not_invented() -> None:
    report = with_source(id="owner/name")
    assert "license" not in front_matter(report)
    assert "Not known to this tool" in model_card(report)


def test_numbers_that_are_not_finite_stay_out_of_the_metadata() -> None:
    report = example_report(measurements=Measurements(source={}, compressed={"perplexity.x": float("inf")}))
    assert "model-index" not in front_matter(report)


def test_the_card_says_its_limits_and_a_failed_verdict() -> None:
    text = model_card(example_report("failed"))
    assert "failed 1 of 4 gates" in text
    assert "has not earned release" in text
    assert "No task benchmarks" in text


def test_hostile_text_stays_text() -> None:
    text = model_card(hostile_report())
    data = front_matter(hostile_report())
    assert "base_model" not in data and "license" not in data
    body = text.split("---\n", 2)[2]
    assert "<script>" not in body
    assert "[link](" not in body
    assert "\x1b" not in text
