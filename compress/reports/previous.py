"""What changed against the release before: a pure function of two reports, and its words and tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from compress.reports.report import (
    GateChange,
    GateResult,
    MeasureChange,
    PreviousRecord,
    RecipeChange,
    Report,
    SchemeChange,
)
from compress.reports.tables import Table, change_text, label_of, split_recipe
from compress.reports.words import MISSING, interval_text, measured, size

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


# --- words and tables ------------------------------------------------------------------------------------------------


def title(record: PreviousRecord) -> str:
    return f"Against {record.version}, {record.chosen}"


def sentences(record: PreviousRecord) -> list[str]:
    """What a reviewer needs before the tables."""
    if record.problem:
        return [f"{record.name} {record.version} could not be compared with: {record.problem}"]
    said = []
    if record.weight_bytes is not None:
        before, now = record.weight_bytes
        said.append(f"Weights: {size(now)} in place of {size(before)}{_ratio(before, now)}.")
    clear = [label_of(each.name) for each in record.measures if each.overlap is False]
    known = [each for each in record.measures if each.overlap is not None]
    if known:
        said.append(
            f"Of {len(known)} measurements with intervals in both, {len(clear)} lie apart: {', '.join(clear)}."
            if clear
            else f"No measurement lies apart: the intervals of all {len(known)} that have one in both overlap."
        )
    if not record.comparable:
        said.append("The source or an evaluation text is another one, so measurements are not of the same thing.")
    turned = [each for each in record.gates if each.previous and each.current and each.previous != each.current]
    said += [f"Gate on {each.measure}: {each.previous} then, {each.current} now." for each in turned]
    if not turned and any(each.previous and each.current for each in record.gates):
        said.append("Every gate of both has the verdict that it had.")
    said.append(
        f"{record.linears_changed:,} linears have another scheme."
        if record.linears_changed
        else "Every linear has the scheme that it had."
    )
    if not record.recipe:
        said.append("The recipe is the same.")
    return said


def _ratio(before: float, now: float) -> str:
    return f" (× {now / before:.3f})" if before else ""


def tables(record: PreviousRecord) -> list[Table]:
    """Measurements, gates, recipe, schemes; a table without rows is left out."""
    found = [_measures_table(record), _gates_table(record), _recipe_table(record), _schemes_table(record)]
    return [table for table in found if table.rows]


def _measures_table(record: PreviousRecord) -> Table:
    said = {True: "overlap", False: "apart", None: MISSING}
    rows = [
        (
            label_of(each.name),
            measured(each.name, each.previous),
            measured(each.name, each.current),
            change_text(each.name, each.previous, each.current),
            interval_text(each.name, each.interval_previous),
            interval_text(each.name, each.interval_current),
            said[each.overlap],
        )
        for each in record.measures
    ]
    headers = (
        "Measure",
        record.version,
        "This",
        "Change",
        f"Interval of {record.version}",
        "Interval of this",
        "Intervals",
    )
    return Table("Measurements of both", headers, "lrrrrrl", rows)


def _gates_table(record: PreviousRecord) -> Table:
    rows = [
        (
            each.measure,
            each.previous or "no such gate",
            each.current or "no such gate",
            each.limit_previous or MISSING,
            each.limit_current or MISSING,
        )
        for each in record.gates
        if (each.previous, each.limit_previous) != (each.current, each.limit_current)
    ]
    headers = ("Measure", f"Verdict of {record.version}", "Verdict now", f"Limit of {record.version}", "Limit now")
    return Table("Gates that differ", headers, "lllll", rows)


def _recipe_table(record: PreviousRecord) -> Table:
    rows = [
        (each.path, each.previous if each.previous is not None else "not set", each.current or "not set")
        for each in record.recipe
    ]
    return Table("Recipe fields that differ", ("Field", record.version, "This"), "lll", rows)


def _schemes_table(record: PreviousRecord) -> Table:
    rows = [(each.scheme, f"{each.previous:,}", f"{each.current:,}") for each in record.schemes]
    return Table("Linears by scheme", ("Scheme", record.version, "This"), "lrr", rows)
