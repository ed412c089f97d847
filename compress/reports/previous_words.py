"""What changed against the release before, in sentences and tables, shared by Markdown and HTML."""

from __future__ import annotations

from compress.reports.changes import PreviousRecord
from compress.reports.tables import Table, change_text, label_of
from compress.reports.words import MISSING, interval_text, measured, size


def title(record: PreviousRecord) -> str:
    verdict = "" if record.verdict in ("", "passed") else f" ({record.verdict})"
    return f"Against {record.version}{verdict}, {record.chosen}"


def sentences(record: PreviousRecord) -> list[str]:
    """What a reviewer needs before the tables."""
    if record.problem:
        return [f"{record.name} {record.version} could not be compared with: {record.problem}"]
    said = []
    if record.verdict not in ("", "passed"):
        said.append(f"Its own verdict was {record.verdict}: it is in use because somebody answered for it.")
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
