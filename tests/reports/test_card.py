"""The model card's front matter as hub tools read it, and its text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData, metadata_load

from compress.reports.card import model_card
from compress.reports.report import Measurements, Report

from .example import example_report, hostile_report, measurements, provenance, stages, task


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


def test_the_hubs_own_classes_read_and_write_the_metadata(tmp_path: Path) -> None:
    """What is read back, written by the hub's library and read again is the same: nothing in it is odd to the hub."""
    path = tmp_path / "README.md"
    path.write_text(model_card(example_report(tasks=[task()])), encoding="utf-8")
    loaded = metadata_load(path)
    data: Any = ModelCardData(**{key: value for key, value in (loaded or {}).items() if key != "model-index"})
    card: Any = ModelCard(path.read_text(encoding="utf-8")).data
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    assert all(isinstance(result, EvalResult) for result in card.eval_results)
    assert len({result.unique_identifier for result in card.eval_results}) == len(
        {(result.dataset_name) for result in card.eval_results}
    )
    again: Any = ModelCardData(model_name=card.model_name, eval_results=card.eval_results, **data.to_dict())
    assert yaml.safe_load(again.to_yaml())["model-index"] == (loaded or {})["model-index"]


def test_the_hub_is_not_told_to_load_a_gguf_file_with_transformers() -> None:
    made = provenance()
    recipe = made["recipe_text"].replace("{format: compressed-tensors}", "{format: gguf}")
    report = example_report(provenance={**made, "recipe_text": recipe})

    assert front_matter(report)["library_name"] == "gguf"
    assert front_matter(example_report())["library_name"] == "transformers"


def pruned(report: Report) -> Report:
    stage = report.stages[0].model_copy(update={"kind": "sparsify", "modules": []})
    return report.model_copy(update={"stages": [stage]})


@pytest.mark.parametrize(
    ("report", "relation"),
    [
        (example_report(), "quantized"),
        (pruned(example_report()), "finetune"),
        (example_report(stages=[]), None),
    ],
)
def test_the_relation_to_the_base_model_is_one_the_hub_knows(report: Report, relation: str | None) -> None:
    assert front_matter(report).get("base_model_relation") == relation


def test_licence_and_languages_are_carried_over_from_the_source() -> None:
    data = front_matter(
        with_source(
            licence="other", licence_name="own-1.0", licence_link="https://example.org/own", language=["en", "pt-BR"]
        )
    )
    assert (data["license"], data["license_name"]) == ("other", "own-1.0")
    assert data["license_link"] == "https://example.org/own" and data["language"] == ["en", "pt-BR"]
    assert "language" not in front_matter(with_source(language=["<script>"]))
    assert "license_name" not in front_matter(with_source(licence="other", licence_name="a\nb: c"))


def test_tags_are_what_people_look_for() -> None:
    assert {"compress", "quantized", "compressed-tensors", "gptq", "int4", "4-bit"} <= set(
        front_matter(example_report())["tags"]
    )


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


@pytest.mark.parametrize(
    ("facts", "wanted"),
    [
        ({}, "mean KL on calibration windows kept out of training 0.2 before and 0.1 after"),
        ({"held_out_from": "calibration"}, "mean KL on calibration windows kept out of training 0.2 before"),
        ({"held_out_from": "self_generated"}, "mean KL on text of the source's own that nothing was fitted to 0.2"),
    ],
)
def test_the_card_says_what_training_was_judged_on(facts: dict[str, str], wanted: str) -> None:
    known = {"held_out_kl_before": 0.2, "held_out_kl_after": 0.1, **facts}
    trained = stages()[0].model_copy(update={"kind": "recover", "modules": [], "facts": known})
    assert wanted in model_card(example_report(stages=[*stages(), trained]))


def test_hostile_text_stays_text() -> None:
    text = model_card(hostile_report())
    data = front_matter(hostile_report())
    assert "base_model" not in data and "license" not in data
    body = text.split("---\n", 2)[2]
    assert "<script>" not in body
    assert "[link](" not in body
    assert "\x1b" not in text
