"""What changed against the release before: a pure function of two reports. Its words are in `previous_words.py`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from compress.reports.changes import GateChange, MeasureChange, PreviousRecord, RecipeChange, SchemeChange
from compress.reports.report import GateResult, Report
from compress.reports.tables import split_recipe
from compress.reports.words import MISSING

_OWN = ("name",)
"""Recipe keys that differ without meaning anything."""


def compare(report: Report, before: Report, chosen: str) -> PreviousRecord:
    """What differs between a report and that of the release before it. `chosen`: why it is that release."""
    ours, theirs = schemes_of(report), schemes_of(before)
    counts, counts_before = Counter(ours.values()), Counter(theirs.values())
    weights = [each.measurements.compressed.get("weight_bytes") for each in (before, report)]
    return PreviousRecord(
        name=before.artifact.name,
        version=before.artifact.version,
        path=before.artifact.path,
        digest=before.artifact.digest,
        verdict=before.verdict,
        chosen=chosen,
        comparable=_comparable(report, before),
        weight_bytes=None if weights[0] is None or weights[1] is None else (weights[0], weights[1]),
        measures=list(_measures(report, before)),
        gates=list(_gates(report.gates, before.gates)),
        recipe=list(_recipe(report, before)),
        schemes=[
            SchemeChange(scheme=scheme, previous=counts_before[scheme], current=counts[scheme])
            for scheme in sorted(counts.keys() | counts_before.keys())
            if counts[scheme] != counts_before[scheme]
        ],
        linears_changed=sum(ours.get(name) != theirs.get(name) for name in ours.keys() | theirs.keys()),
    )


def schemes_of(report: Report) -> dict[str, str]:
    """{linear: the scheme it has in the end}; a later stage's word counts."""
    return {module.name: module.scheme for stage in report.stages for module in stage.modules}


def _comparable(report: Report, before: Report) -> bool:
    """The same source, and the same texts and questions under the names that both have."""
    ours, theirs = _measured_on(report), _measured_on(before)
    return all(ours[name] == theirs[name] for name in ours.keys() & theirs.keys())


def _measured_on(report: Report) -> dict[tuple[str, str], object]:
    """Digests of what measurements are made on, by role and name."""
    source = report.provenance.get("source")
    found: dict[tuple[str, str], object] = {}
    if isinstance(source, Mapping):
        found["source", ""] = source.get("digest")
    found |= {("text", str(item.get("set", item.get("name")))): item.get("digest") for item in report.evaluation}
    found |= {("task", task.name): task.prompts_digest for task in report.tasks}
    return found


def _measures(report: Report, before: Report) -> Iterator[MeasureChange]:
    for name, current in report.measurements.compressed.items():
        previous = before.measurements.compressed.get(name)
        if previous is None or name.startswith("round_trip."):
            continue  # a round trip is of one version only
        intervals = before.measurements.intervals.get(name), report.measurements.intervals.get(name)
        yield MeasureChange(
            name=name,
            previous=previous,
            current=current,
            interval_previous=intervals[0],
            interval_current=intervals[1],
            overlap=_overlap(*intervals),
        )


def _overlap(one: tuple[float, float] | None, other: tuple[float, float] | None) -> bool | None:
    return None if one is None or other is None else one[0] <= other[1] and other[0] <= one[1]


def _gates(ours: list[GateResult], theirs: list[GateResult]) -> Iterator[GateChange]:
    """In the order of this report, then those that only the previous one has. Two gates of one kind on one measure are
    told apart by their order."""
    current, previous = _numbered(ours), _numbered(theirs)
    for key in dict.fromkeys([*current, *previous]):
        now, then = current.get(key), previous.get(key)
        yield GateChange(
            kind=key[0],
            measure=key[1],
            previous=then.verdict if then else None,
            current=now.verdict if now else None,
            limit_previous=then.limit if then else None,
            limit_current=now.limit if now else None,
        )


def _numbered(gates: list[GateResult]) -> dict[tuple[str, str, int], GateResult]:
    found: dict[tuple[str, str, int], GateResult] = {}
    seen: Counter[tuple[str, str]] = Counter()
    for gate in gates:
        found[gate.kind, gate.measure, seen[gate.kind, gate.measure]] = gate
        seen[gate.kind, gate.measure] += 1
    return found


def _recipe(report: Report, before: Report) -> Iterator[RecipeChange]:
    ours, theirs = recipe_values(report), recipe_values(before)
    for path in dict.fromkeys([*ours, *theirs]):
        if ours.get(path) != theirs.get(path) and path not in _OWN:
            yield RecipeChange(path=path, previous=theirs.get(path), current=ours.get(path))


def recipe_values(report: Report) -> dict[str, str]:
    """{dotted path: value as text} of the resolved recipe; empty where the report holds none that can be read."""
    return dict(_flat(resolved_recipe(report)))


def resolved_recipe(report: Report) -> dict[str, Any]:
    """The resolved recipe as a mapping; empty where the report holds none that can be read."""
    _, text = split_recipe(report.provenance)
    try:
        loaded = yaml.safe_load(text) if text else None
    except yaml.YAMLError:
        return {}
    return loaded if isinstance(loaded, dict) else {}


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list) and value:
        for at, inner in enumerate(value):
            yield from _flat(inner, f"{path}.{at}" if path else str(at))
    elif path:
        yield path, MISSING if value is None else str(value)
