"""What differs between two artifacts, on plain reports of a few numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compress.artifacts.diff import difference, fields, gates, measures
from compress.artifacts.diff_layers import MOST_LAYERS, layers
from compress.errors import CompressError

from .conftest import KL_GATE

Publish = Callable[..., Path]


def linear(scheme: str, error: float | None) -> dict[str, Any]:
    return {"scheme": scheme, "error": error}


def test_fields_are_compared_leaf_by_leaf() -> None:
    a = {"seed": 0, "stages": [{"kind": "gptq", "bits": 4}], "gates": []}
    b = {"seed": 0, "stages": [{"kind": "gptq", "bits": 3}, {"kind": "recover"}], "gates": [], "name": "x"}
    assert [(field.name, field.a, field.b) for field in fields(a, b)] == [
        ("stages.0.bits", 4, 3),
        ("stages.1.kind", None, "recover"),
        ("name", None, "x"),
    ]
    assert fields(a, a) == ()


def test_measures_have_difference_ratio_and_whether_intervals_part() -> None:
    def report(kl: float, low: float, high: float, **more: float) -> dict[str, Any]:
        return {"measurements": {"compressed": {"kl": kl, **more}, "intervals": {"kl": [low, high]}}}

    kl, only = measures(report(0.1, 0.08, 0.12), report(0.2, 0.18, 0.22, weight_bytes=9.0))
    assert (kl.difference, kl.ratio, kl.apart) == (0.1, 2.0, True)
    assert (only.a, only.b, only.difference, only.apart) == (None, 9.0, None, None)
    (overlapping,) = measures(report(0.1, 0.08, 0.12), report(0.11, 0.09, 0.13))
    assert overlapping.apart is False


def test_numbers_that_json_lacks_are_read() -> None:
    report = {"measurements": {"compressed": {"kl": "Infinity"}}}
    (kl,) = measures(report, {"measurements": {"compressed": {"kl": 1.0}}})
    assert kl.a == float("inf")


def test_gates_are_paired_by_kind_and_measure_and_then_in_order() -> None:
    strict = {**KL_GATE, "limit": "<= 0.05"}
    size = {**KL_GATE, "kind": "size", "measure": "weight_bytes"}
    paired = gates({"gates": [KL_GATE, strict]}, {"gates": [{**KL_GATE, "verdict": "passed"}, size]})
    assert [(gate.gate, gate.limit_a, gate.verdict_a, gate.verdict_b) for gate in paired] == [
        ("threshold:divergence.held-out.mean_kl", "<= 0.1", "failed", "passed"),
        ("threshold:divergence.held-out.mean_kl", "<= 0.05", "failed", None),
        ("size:weight_bytes", None, None, "failed"),
    ]


def test_layers_are_summed_up_by_change_of_scheme_and_error() -> None:
    a = {"q": linear("int4", 0.01), "k": linear("int4", 0.01), "o": linear("int4", 0.02), "old": linear("int4", None)}
    b = {"q": linear("int8", 0.001), "k": linear("int8", 0.002), "o": linear("int4", 0.03), "new": linear("int4", 1.0)}
    found = layers(a, b)
    assert found.compared == 3
    assert [(change.a, change.b, change.linears, change.examples) for change in found.schemes] == [
        ("int4", "int8", 2, ("q", "k")),
        ("int4", None, 1, ("old",)),
        (None, "int4", 1, ("new",)),
    ]
    assert (found.better, found.worse) == (0, 1)
    assert found.median_error_ratio == pytest.approx(0.2)
    assert [layer.name for layer in found.farthest] == ["q", "k", "o"]


def test_only_the_farthest_layers_are_named() -> None:
    a = {f"layer.{number}": linear("int4", 1.0) for number in range(100)}
    b = {f"layer.{number}": linear("int4", 1.0 + number) for number in range(100)}
    found = layers(a, b)
    assert (found.worse, len(found.farthest)) == (99, MOST_LAYERS)
    assert found.farthest[0].name == "layer.99"


def test_two_versions_of_one_model(publish: Publish) -> None:
    first = publish()
    second = publish(prepare=lambda folder: (folder / "recipe.yaml").write_text("schema: 1\nseed: 2\n"))
    found = difference(first, second)
    assert found.same_model
    assert (found.a.reference, found.b.reference) == ("demo@v0001", "demo@v0002")
    assert [(field.name, field.b) for field in found.recipe] == [("seed", 2)]
    assert found.environment == () and found.lineage == ()
    assert next(size.difference for size in found.sizes if size.name == "total") == len("seed: 2\n")
    assert json.loads(found.model_dump_json())["same_model"] is True


def stage(kind: str, scheme: str, error: float | None, **facts: Any) -> dict[str, Any]:
    return {"kind": kind, "facts": facts, "modules": [{"name": "q", "scheme": scheme, "error": error}]}


@pytest.fixture
def made(publish: Publish) -> Callable[..., Path]:
    """A version whose report tells of these stages."""

    def made(*stages: dict[str, Any]) -> Path:
        def write(folder: Path) -> None:
            (folder / "reports" / "report.json").write_text(json.dumps({"stages": stages}))

        return publish(prepare=write)

    return made


def test_what_stages_tell_is_compared_but_for_tables_and_curves(made: Callable[..., Path]) -> None:
    def trained(after: float) -> dict[str, Any]:
        return stage("recover", "int4", None, held_out_kl_after=after, steps=8, held_out=[f"8: {after}"])

    solved = stage("gptq", "int4", 0.01)
    found = difference(made(solved, trained(0.5), trained(0.4)), made(solved, trained(0.25), trained(0.4)))
    assert [(field.name, field.a, field.b) for field in found.stages] == [("recover.held_out_kl_after", 0.5, 0.25)]
    found = difference(made(solved, trained(0.5)), made(solved, trained(0.5), trained(0.4)))
    assert found.stages == (), "that one has a stage more is in the recipe"
    assert difference(made(solved), made(stage("awq", "int4", 0.01))).stages == ()


def test_errors_from_before_a_stage_that_measures_none_compare_with_such_only(made: Callable[..., Path]) -> None:
    trained = stage("recover", "int4", None)
    first, second = made(stage("gptq", "int4", 0.01), trained), made(stage("gptq", "int4", 0.005), trained)
    found = difference(first, second)
    assert (found.layers.better, found.layers.median_error_ratio) == (1, pytest.approx(0.5))
    assert found.layers.note == "errors are those before recover, which measured none"

    found = difference(made(stage("gptq", "int4", 0.01)), first)
    assert found.layers.median_error_ratio is None
    assert found.layers.note == (
        "errors of 1 layers are not compared: recover changed them in one of the two, and measured none"
    )

    rounded = made(stage("gptq", "int4", 0.01), stage("round_to_nearest", "int8", None))
    found = difference(rounded, rounded)
    assert found.layers.median_error_ratio is None and found.layers.note == "", "that error was another scheme's"


def test_what_is_missing_is_a_note_and_what_is_broken_an_error(publish: Publish) -> None:
    first = publish(prepare=lambda folder: (folder / "reports" / "report.json").unlink())
    second = publish(prepare=lambda folder: (folder / "recipe.yaml").unlink())
    found = difference(first, second)
    assert [note.split(": ")[1] for note in found.notes] == [
        "not there, so measurements, gates and layers are not compared",
        "not there, so the recipe is not compared",
    ]
    broken = publish(prepare=lambda folder: (folder / "reports" / "report.json").write_text("{"))
    with pytest.raises(CompressError, match=r"report\.json: cannot be read as JSON"):
        difference(first, broken)


def test_numbers_measured_on_other_things_do_not_compare(publish: Publish) -> None:
    def told(source: str, text: str, prompts: str) -> Callable[[Path], None]:
        report = {
            "provenance": {"source": {"digest": source}},
            "evaluation": [{"name": "held-out", "set": "held-out", "digest": text}],
            "tasks": [{"name": "quiz", "prompts_digest": prompts}],
        }
        return lambda folder: (folder / "reports" / "report.json").write_text(json.dumps(report)) and None

    first, same = publish(prepare=told("a", "b", "c")), publish(prepare=told("a", "b", "c"))
    assert difference(first, same).comparable and difference(first, same).notes == ()
    found = difference(first, publish(prepare=told("x", "y", "z")))
    assert not found.comparable
    assert found.notes == (
        "not measured on the same: the source, the text held-out, the task quiz; their numbers do not compare",
    )
    assert difference(first, publish()).comparable, "what one of them does not tell is no contradiction"
