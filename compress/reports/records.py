"""A report as flat records, for tools that track experiments: one JSON object a line, `type` first.

    run      name, version, digest, started, seconds
    param    name (dotted path in the resolved recipe), value (text)
    metric   name (source.<measure>, compressed.<measure>, memory.<part>.predicted or .measured), value; low and high
             where there is a 95 % interval
    stage    index, kind, seconds, reused, weight bytes before and after, seconds by part
    gate     kind, measure, observed, limit, verdict, tier
    event    kind, where, message
    verdict  verdict, sentence; the last line

Numbers that JSON does not know are the texts "NaN", "Infinity" and "-Infinity", as in report.json.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from compress.reports.previous import recipe_values
from compress.reports.report import PredictedMeasured, Report
from compress.reports.words import headline

Record = dict[str, Any]


def records(report: Report) -> Iterator[Record]:
    """Every record of a report, in the order above."""
    yield {
        "type": "run",
        "name": report.artifact.name,
        "version": report.artifact.version,
        "digest": report.artifact.digest,
        "started": str(report.provenance.get("started", "")),
        "seconds": _number(sum(report.seconds_by_step.values())),
    }
    for path, value in recipe_values(report).items():
        yield {"type": "param", "name": path, "value": value}
    yield from _metrics(report)
    for index, stage in enumerate(report.stages):
        yield {
            "type": "stage",
            "index": index,
            "kind": stage.kind,
            "seconds": _number(stage.seconds),
            "reused": stage.reused,
            "weight_bytes_before": stage.weight_bytes_before,
            "weight_bytes_after": stage.weight_bytes_after,
            "seconds_by_part": {name: _number(seconds) for name, seconds in stage.seconds_by_part.items()},
        }
    for gate in report.gates:
        yield {
            "type": "gate",
            "kind": gate.kind,
            "measure": gate.measure,
            "observed": None if gate.observed is None else _number(gate.observed),
            "limit": gate.limit,
            "verdict": gate.verdict,
            "tier": gate.tier,
        }
    for event in report.events:
        yield {"type": "event", "kind": event.kind, "where": event.where, "message": event.message}
    yield {"type": "verdict", "verdict": report.verdict, "sentence": headline(report)}


def _metrics(report: Report) -> Iterator[Record]:
    measurements, memory = report.measurements, report.memory
    for name, value in measurements.source.items():
        yield {"type": "metric", "name": f"source.{name}", "value": _number(value)}
    for name, value in measurements.compressed.items():
        interval = measurements.intervals.get(name)
        ends = {"low": _number(interval[0]), "high": _number(interval[1])} if interval else {}
        yield {"type": "metric", "name": f"compressed.{name}", "value": _number(value), **ends}
    for part in ("stored", "resident", "kv_cache", "peak_host", "peak_device"):
        both: PredictedMeasured = getattr(memory, part)
        for how, amount in (("predicted", both.predicted), ("measured", both.measured)):
            if amount is not None:
                yield {"type": "metric", "name": f"memory.{part}.{how}", "value": _number(amount)}


def _number(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
