"""What differs between two artifacts: recipe, stages, measurements, gates, layers, sizes, environment.

Works on what lies in the folders (manifest.json, recipe.yaml, reports/report.json) as plain values, so that artifacts
of other versions of this program can be compared as far as they tell. What one of them does not tell is a note.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from compress.artifacts import manifest
from compress.artifacts.diff_grounds import measured_apart, part_of
from compress.artifacts.diff_layers import Layers, Value, layers, number, ratio_of
from compress.artifacts.manifest import MODEL_FOLDER, Manifest
from compress.errors import CompressError

Interval = tuple[float, float]


class Side(Value):
    """One of the two artifacts."""

    reference: str
    path: str
    verdict: str
    created: str
    digest: str
    model_digest: str
    parent: str | None = None


class Field_(Value):
    """A field that differs. None: it is not there."""

    name: str = Field(description="dotted, e.g. stages.0.bits")
    a: Any = None
    b: Any = None


class Measure(Value):
    """A measurement of the compressed models; all are listed, also those that are equal."""

    name: str
    a: float | None
    b: float | None
    difference: float | None = Field(description="b - a")
    ratio: float | None = Field(description="b / a")
    interval_a: Interval | None = None
    interval_b: Interval | None = None
    apart: bool | None = Field(default=None, description="the intervals do not overlap; None without both")


class GatePair(Value):
    """A gate that either of them has."""

    gate: str = Field(description="KIND:MEASURE")
    verdict_a: str | None
    verdict_b: str | None
    observed_a: float | None
    observed_b: float | None
    limit_a: str | None
    limit_b: str | None


class Difference(Value):
    """All that differs. Bytes are bytes; JSON values only."""

    a: Side
    b: Side
    same_model: bool = Field(description="the same bytes below model/, but for the card")
    comparable: bool = Field(description="measured on the same source, texts and questions, as far as both tell")
    recipe: tuple[Field_, ...]
    stages: tuple[Field_, ...] = Field(description="what stages tell of themselves, numbers and words of it")
    lineage: tuple[Field_, ...]
    environment: tuple[Field_, ...]
    measurements: tuple[Measure, ...]
    gates: tuple[GatePair, ...]
    sizes: tuple[Measure, ...] = Field(description="bytes: total, model, reports, and each file of model/ that differs")
    layers: Layers
    notes: tuple[str, ...] = Field(description="what could not be compared")


def difference(folder_a: Path, folder_b: Path) -> Difference:
    """Compare two artifact folders. Raises CompressError when a manifest, recipe or report cannot be read."""
    one, other = manifest.read(folder_a), manifest.read(folder_b)
    notes: list[str] = []
    report_a, report_b = _report(folder_a, notes), _report(folder_b, notes)
    linears_a, linears_b = _linears(report_a), _linears(report_b)
    note = _comparable(linears_a, linears_b)
    others = measured_apart(report_a, report_b)
    if others:
        notes.append(f"not measured on the same: {', '.join(others)}; their numbers do not compare")
    return Difference(
        a=_side(one, folder_a),
        b=_side(other, folder_b),
        same_model=one.model_digest == other.model_digest,
        comparable=not others,
        recipe=fields(_recipe(folder_a, notes), _recipe(folder_b, notes)),
        stages=_stages(told(report_a), told(report_b)),
        lineage=fields(one.lineage, other.lineage),
        environment=fields(one.environment, other.environment),
        measurements=measures(report_a, report_b),
        gates=gates(report_a, report_b),
        sizes=sizes(one, other),
        layers=layers(linears_a, linears_b, note),
        notes=tuple(notes),
    )


def fields(a: Any, b: Any) -> tuple[Field_, ...]:
    """Every leaf of two nested values that differs, by its dotted name."""
    one, other = dict(_flat(a)), dict(_flat(b))
    names = [*one, *(name for name in other if name not in one)]
    return tuple(
        Field_(name=name, a=one.get(name), b=other.get(name)) for name in names if one.get(name) != other.get(name)
    )


def told(report: Mapping[str, Any]) -> dict[str, Any]:
    """{kind of stage: numbers and words that it tells of itself}; tables and curves are left out. A second stage of a
    kind is `<kind>#2`."""
    seen: Counter[str] = Counter()
    found = {}
    for stage in report.get("stages") or []:
        kind = str(stage.get("kind"))
        seen[kind] += 1
        facts = {
            name: value for name, value in (stage.get("facts") or {}).items() if not isinstance(value, list | dict)
        }
        if facts:
            found[kind if seen[kind] == 1 else f"{kind}#{seen[kind]}"] = facts
    return found


def _stages(a: dict[str, Any], b: dict[str, Any]) -> tuple[Field_, ...]:
    """Of stages that both have: that one has a stage more is in the recipe."""
    return fields(*({kind: told for kind, told in each.items() if kind in a and kind in b} for each in (a, b)))


def measures(report_a: Mapping[str, Any], report_b: Mapping[str, Any]) -> tuple[Measure, ...]:
    """Measurements of the compressed models side by side, in the order of their names."""
    values = [part_of(report, "measurements", "compressed") for report in (report_a, report_b)]
    intervals = [part_of(report, "measurements", "intervals") for report in (report_a, report_b)]
    made = []
    for name in sorted(set(values[0]) | set(values[1])):
        a, b = (number(side.get(name)) for side in values)
        first, second = (_interval(side.get(name)) for side in intervals)
        made.append(_measure(name, a, b, first, second))
    return tuple(made)


def gates(report_a: Mapping[str, Any], report_b: Mapping[str, Any]) -> tuple[GatePair, ...]:
    """Gates by kind and measure; several of one kind and measure are paired in their order."""
    one, other = _gates(report_a), _gates(report_b)
    return tuple(
        GatePair(
            gate=key[0],
            verdict_a=one.get(key, {}).get("verdict"),
            verdict_b=other.get(key, {}).get("verdict"),
            observed_a=number(one.get(key, {}).get("observed")),
            observed_b=number(other.get(key, {}).get("observed")),
            limit_a=one.get(key, {}).get("limit"),
            limit_b=other.get(key, {}).get("limit"),
        )
        for key in [*one, *(key for key in other if key not in one)]
    )


def sizes(one: Manifest, other: Manifest) -> tuple[Measure, ...]:
    """Bytes of the whole, of model/ and reports/, and of each file of model/ that differs in size."""

    def of(made: Manifest) -> dict[str, float]:
        found = {"total": float(made.bytes)}
        for part in (MODEL_FOLDER, "reports"):
            found[f"{part}/"] = float(sum(entry.bytes for entry in made.files if entry.path.startswith(f"{part}/")))
        return found | {entry.path: float(entry.bytes) for entry in made.files if entry.path.startswith(MODEL_FOLDER)}

    a, b = of(one), of(other)
    always = ("total", f"{MODEL_FOLDER}/", "reports/")
    names = [*always, *sorted(name for name in {*a, *b} - {*always} if a.get(name) != b.get(name))]
    return tuple(_measure(name, a.get(name), b.get(name), None, None) for name in names)


def _side(made: Manifest, folder: Path) -> Side:
    return Side(
        reference=f"{made.name}@{made.version}",
        path=str(folder),
        verdict=made.verdict,
        created=made.created.isoformat(),
        digest=made.digest,
        model_digest=made.model_digest,
        parent=made.parent.reference if made.parent else None,
    )


def _report(folder: Path, notes: list[str]) -> dict[str, Any]:
    path = folder / "reports" / "report.json"
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        notes.append(f"{path}: not there, so measurements, gates and layers are not compared")
        return {}
    except (OSError, ValueError) as error:
        raise CompressError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise CompressError(f"{path}: not a report, but {type(content).__name__}")
    return content


def _recipe(folder: Path, notes: list[str]) -> Any:
    path = folder / "recipe.yaml"
    try:
        return yaml.safe_load(path.read_bytes())
    except FileNotFoundError:
        notes.append(f"{path}: not there, so the recipe is not compared")
        return {}
    except (OSError, yaml.YAMLError) as error:
        raise CompressError(f"{path}: cannot be read as YAML ({error})") from error


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        items: Any = value.items()
    elif isinstance(value, list) and value:
        items = enumerate(value)
    else:
        if name:
            yield name, value
        return
    for key, inner in items:
        yield from _flat(inner, f"{name}.{key}" if name else str(key))


def _gates(report: Mapping[str, Any]) -> dict[tuple[str, int], dict[str, Any]]:
    seen: Counter[str] = Counter()
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for gate in report.get("gates") or []:
        key = f"{gate.get('kind')}:{gate.get('measure')}"
        found[key, seen[key]] = gate
        seen[key] += 1
    return found


def _linears(report: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The last record of each linear. Where the last stage kept its scheme and measured no error, that of an earlier
    stage, and in `changed_by` the kind of the last."""
    found: dict[str, dict[str, Any]] = {}
    for stage in report.get("stages") or []:
        for record in stage.get("modules") or []:
            before = found.get(record.get("name"), {})
            if record.get("error") is None and before.get("scheme") == record.get("scheme"):
                record = {**record, "error": before.get("error"), "changed_by": str(stage.get("kind"))}
            if "name" in record:
                found[record["name"]] = record
    return found


def _comparable(a: dict[str, dict[str, Any]], b: dict[str, dict[str, Any]]) -> str:
    """Take errors away where one is of the linear as it ships and the other of what a stage changed after that. Returns
    what is to be said of errors, if anything."""
    kinds: dict[str, None] = {}
    apart = 0
    for name in set(a) & set(b):
        one, other = a[name], b[name]
        changed = [
            each["changed_by"] for each in (one, other) if each.get("error") is not None and "changed_by" in each
        ]
        kinds |= dict.fromkeys(changed)
        if len(changed) == 1:
            one["error"] = other["error"] = None
            apart += 1
    kind = " and ".join(kinds)
    if apart:
        return f"errors of {apart} layers are not compared: {kind} changed them in one of the two, and measured none"
    return f"errors are those before {kind}, which measured none" if kinds else ""


def _measure(name: str, a: float | None, b: float | None, first: Interval | None, second: Interval | None) -> Measure:
    apart = None if first is None or second is None else first[1] < second[0] or second[1] < first[0]
    return Measure(
        name=name,
        a=a,
        b=b,
        difference=None if a is None or b is None else b - a,
        ratio=ratio_of(a, b),
        interval_a=first,
        interval_b=second,
        apart=apart,
    )


def _interval(value: Any) -> Interval | None:
    return (float(value[0]), float(value[1])) if isinstance(value, list) and len(value) == 2 else None
