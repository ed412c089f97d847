"""What changed against the release before: from two reports, and how both faces say it."""

from __future__ import annotations

from typing import Any

import pytest

from compress.reports.changes import PreviousRecord
from compress.reports.html import render_html
from compress.reports.markdown import render_markdown
from compress.reports.previous import compare
from compress.reports.previous_words import sentences, tables
from compress.reports.report import ArtifactRef, Measurements, Report

from .example import DIGEST, RECIPE, example_report, measurements, provenance, stages, task

BEFORE = ArtifactRef(path="store/smollm2-w4/v0002", name="smollm2-w4", version="v0002", digest=DIGEST)


def before(**changes: Any) -> Report:
    return example_report(artifact=BEFORE, **changes)


def with_kl(value: float, low: float, high: float) -> Measurements:
    """The example's measurements with another mean KL on python-docs."""
    name, base = "divergence.python-docs.mean_kl", measurements()
    return Measurements(
        source=base.source,
        compressed={**base.compressed, name: value, "weight_bytes": 120_000_000.0},
        intervals={**base.intervals, name: (low, high)},
    )


def test_a_report_against_itself_has_no_difference() -> None:
    found = compare(example_report(), before(), "the newest")
    assert (found.version, found.comparable, found.recipe, found.schemes, found.linears_changed) == (
        "v0002",
        True,
        [],
        [],
        0,
    )
    assert all(each.previous == each.current for each in (*found.measures, *found.gates))
    said = " ".join(sentences(found))
    assert "The recipe is the same." in said and "No measurement lies apart" in said


@pytest.mark.parametrize(("interval", "overlap"), [((0.07, 0.08), False), ((0.0640, 0.08), True)])
def test_intervals_overlap_or_lie_apart(interval: tuple[float, float], overlap: bool) -> None:
    """The example's own interval is 0.0583 to 0.0647."""
    found = compare(example_report(), before(measurements=with_kl(0.075, *interval)), "")
    by_name = {each.name: each for each in found.measures}
    assert by_name["divergence.python-docs.mean_kl"].overlap is overlap
    assert by_name["divergence.python-docs.kl_p99"].overlap is None
    assert found.weight_bytes == (120_000_000.0, 102_760_448.0)
    assert ("1 lie apart" in " ".join(sentences(found))) is not overlap


def test_a_measurement_of_one_report_only_is_not_compared() -> None:
    fewer = measurements().model_copy(update={"compressed": {"weight_bytes": 1.0}})
    assert [each.name for each in compare(example_report(), before(measurements=fewer), "").measures] == [
        "weight_bytes"
    ]


def test_a_verdict_that_turned_is_a_sentence_and_new_gates_are_rows() -> None:
    now, then = example_report("failed"), before()
    then = then.model_copy(update={"gates": then.gates[:3]})
    found = compare(now, then, "")
    assert "Gate on perplexity.python-docs: passed then, failed now." in sentences(found)
    (table,) = [table for table in tables(found) if table.title == "Gates that differ"]
    assert [row[:3] for row in table.rows] == [
        ("perplexity.python-docs", "passed", "failed"),
        ("rounding_fallback", "no such gate", "passed"),
    ]


def test_recipe_fields_and_schemes_that_differ_are_counted() -> None:
    recipe = RECIPE.replace("bits: 4", "bits: 3").replace("    symmetric: true\n", "")
    old = stages()[0]
    modules = [
        module.model_copy(update={"scheme": "int3 symmetric group 64"}) if "down" in module.name else module
        for module in old.modules
    ]
    then = before(
        provenance={**provenance(), "recipe_text": recipe},
        stages=[old.model_copy(update={"modules": modules})],
    )
    found = compare(example_report(), then, "")
    assert [(each.path, each.previous, each.current) for each in found.recipe] == [
        ("stages.0.bits", "3", "4"),
        ("stages.0.symmetric", None, "True"),
    ]
    assert [(each.scheme, each.previous, each.current) for each in found.schemes] == [
        ("int3 symmetric group 64", 30, 0),
        ("int4 symmetric group 64", 180, 210),
    ]
    assert found.linears_changed == 30


def test_another_source_or_other_questions_under_the_same_name_are_said() -> None:
    source = {**provenance()["source"], "digest": "f" * 64}
    for then in (before(provenance={**provenance(), "source": source}), before(tasks=[task(prompts_digest="0" * 64)])):
        found = compare(example_report(tasks=[task()]), then, "")
        assert not found.comparable
        assert any("not of the same thing" in each for each in sentences(found))


def test_a_task_that_only_one_of_them_asked_leaves_them_comparable() -> None:
    assert compare(example_report(tasks=[task()]), before(), "").comparable


def test_both_faces_show_it_and_a_recipe_that_is_no_yaml_stops_nothing() -> None:
    then = before(provenance={**provenance(), "recipe_text": "a: [\nb"})
    record = compare(example_report("failed"), then, "which production leads to")
    report = example_report("failed", previous=record)
    for face in (render_markdown(report), render_html(report)):
        assert "Against v0002, which production leads to" in face
        assert "Gates that differ" in face


def test_a_release_that_cannot_be_read_is_named_with_its_problem() -> None:
    record = PreviousRecord(name="n", version="v0001", path="p", digest="", chosen="the newest", problem="it is gone")
    report = example_report(previous=record)
    for face in (render_markdown(report), render_html(report)):
        assert "n v0001 could not be compared with: it is gone" in face
