"""The tables of a report as finished text, shared by Markdown and HTML."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compress.events import EVENT_KINDS
from compress.reports.report import GateResult, PredictedMeasured, Report, StageRecord
from compress.reports.words import (
    MEASURES,
    MISSING,
    MOST_EVENTS,
    ORDER,
    duration,
    interval_text,
    measured,
    number,
    percent,
    size,
)


@dataclass(frozen=True)
class Table:
    """Rows of finished text. `align` holds one letter per column: l for words, r for numbers."""

    title: str
    headers: tuple[str, ...]
    align: str
    rows: Sequence[tuple[str, ...]]


def gates_table(report: Report) -> Table:
    rows = [
        (
            gate.verdict,
            gate.tier,
            gate.measure,
            observed_text(gate, gate.observed),
            MISSING if gate.interval is None else " to ".join(observed_text(gate, end) for end in gate.interval),
            gate.limit,
            gate.sentence,
        )
        for gate in report.gates
    ]
    headers = ("Verdict", "Tier", "Measure", "Observed", "Interval", "Limit", "In words")
    return Table("Gates", headers, "lllrrll", rows)


def observed_text(gate: GateResult, value: float | None) -> str:
    """In the unit of the limit. Relative gates observe a ratio, whatever unit the measure has; it is shown bare."""
    kind, measure = gate.kind, gate.measure
    if value is None:
        return "not measured"
    if kind == "non_inferiority" and not measure.startswith("divergence."):
        return f"{100 * value:.3g} {'%' if measure.startswith('perplexity.') else 'points'}"
    in_bytes = kind == "memory" or (kind in ("threshold", "size") and measure.endswith("bytes"))
    return size(value) if in_bytes and value >= 1 << 20 else number(value)


def quality_tables(report: Report) -> list[Table]:
    """Before and after: one table for the whole model, then one for each evaluation set."""
    groups: dict[str, list[str]] = {"": []}
    for name in dict.fromkeys([*report.measurements.compressed, *report.measurements.source]):
        if name.startswith("round_trip.") or (report.tasks and name.startswith("task.")):
            continue  # they have a section of their own
        groups.setdefault(_group(name), []).append(name)
    headers = ("Measure", "Source", "Compressed", "Change", "95 % interval")
    return [
        Table(
            group or "Whole model", headers, "lrrrr", [_quality_row(report, name) for name in sorted(names, key=_rank)]
        )
        for group, names in groups.items()
        if names
    ]


def noise_table(report: Report) -> Table:
    """What is no difference between models: the source against itself."""
    rows = [
        (
            noise.name,
            f"{noise.windows} windows in batches of {noise.batch} and of {noise.other_batch}",
            number(noise.mean_kl),
            f"× {noise.perplexity_ratio:.6f}",
            percent(noise.top1_agreement),
        )
        for noise in report.noise
    ]
    headers = ("Text", "The source against itself", "Mean KL (nats)", "Perplexity", "Same most likely token")
    return Table("Noise floor", headers, "llrrr", rows)


def measures_by_set(measurements: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """{set: {measure without the set: value}}; measures of the whole model are under ""."""
    found: dict[str, dict[str, float]] = {}
    for name in sorted(measurements, key=_rank):
        if name.startswith("round_trip."):
            continue
        found.setdefault(_group(name), {})[_what(name)] = measurements[name]
    return found


def label(what: str) -> str:
    """A measure in words: `kl_p99` is "KL divergence, 99th percentile"."""
    return MEASURES.get(what, what.replace("_", " "))


def label_of(name: str) -> str:
    """A flat name in words, with its set or task: `perplexity.docs` is "docs: Perplexity"."""
    group = _group(name)
    return f"{group}: {label(_what(name))}" if group else label(_what(name))


def _group(name: str) -> str:
    """`perplexity.<set>` and `divergence.<set>.<what>` belong to <set>; set names may hold dots."""
    family, _, rest = name.partition(".")
    return rest if family == "perplexity" else rest.rpartition(".")[0]


def _what(name: str) -> str:
    return "perplexity" if name.startswith("perplexity.") else name.rpartition(".")[2]


def _rank(name: str) -> tuple[int, str]:
    what = _what(name)
    return (ORDER.index(what) if what in ORDER else len(ORDER), name)


def _quality_row(report: Report, name: str) -> tuple[str, ...]:
    before, after = report.measurements.source.get(name), report.measurements.compressed.get(name)
    return (
        label(_what(name)),
        measured(name, before),
        measured(name, after),
        change_text(name, before, after),
        interval_text(name, report.measurements.intervals.get(name)),
    )


def change_text(name: str, before: float | None, after: float | None) -> str:
    if not before or after is None or not math.isfinite(after / before):
        return MISSING
    if name.endswith(("accuracy", "accuracy_norm", "top1_agreement")):
        return f"{100 * (after - before):+.1f} points"
    return f"× {after / before:.3f}"


def memory_table(report: Report) -> Table:
    memory = report.memory
    cache = f"KV cache: {memory.context:,} tokens, {memory.concurrency} at once"
    rows = [
        ("Source weights, stored", MISSING, size(memory.source_stored), MISSING, ""),
        _memory_row("Weights, stored", memory.stored),
        _memory_row("Weights, loaded", memory.resident),
        _memory_row(cache, memory.kv_cache),
        _memory_row("Peak host memory of the run", memory.peak_host),
        _memory_row("Peak device memory of the run", memory.peak_device),
    ]
    return Table("Memory", ("What", "Predicted", "Measured", "Prediction error", "Note"), "lrrrl", rows)


def _memory_row(label: str, both: PredictedMeasured) -> tuple[str, ...]:
    error = MISSING
    if both.predicted is not None and both.measured:
        error = f"{100 * (both.predicted - both.measured) / both.measured:+.1f} %"
    return label, size(both.predicted), size(both.measured), error, both.note


def stages_table(report: Report) -> Table:
    rows = [
        (
            f"{stage.kind} ({quality})" if (quality := stage.config.get("quality")) else stage.kind,
            "reused" if stage.reused else duration(stage.seconds),
            time_split(stage.seconds_by_part) or MISSING,
            f"{size(stage.weight_bytes_before)} → {size(stage.weight_bytes_after)}",
            size(stage.peak_host_bytes),
            str(len(stage.modules)),
        )
        for stage in report.stages
    ]
    headers = ("Stage", "Time", "Of which", "Weights", "Peak host memory", "Linears")
    return Table("Stages", headers, "lrlrrr", rows)


def time_split(parts: Mapping[str, float]) -> str:
    """'solve 12 s (61 %), forward 6 s (30 %)', the longest first."""
    total = sum(parts.values())
    if total <= 0:
        return ""
    ordered = sorted(parts.items(), key=lambda part: -part[1])
    return ", ".join(f"{name} {duration(seconds)} ({100 * seconds / total:.0f} %)" for name, seconds in ordered)


def worst_table(stage: StageRecord, most: int = 8) -> Table:
    """The linears whose output changed most, the worst first."""
    known = [(module.error, module) for module in stage.modules if module.error is not None]
    # Infinite and undefined errors are the worst there are.
    known.sort(key=lambda each: -each[0] if math.isfinite(each[0]) else -math.inf)
    worst = [module for _, module in known[:most]]
    rows = [
        (
            module.name,
            module.scheme,
            number(module.error),
            number(module.rounding_error),
            number(module.damping),
            "yes" if module.refined else MISSING,
            ", ".join(module.events) or MISSING,
        )
        for module in worst
    ]
    headers = ("Linear", "Scheme", "Error", "Plain rounding", "Damping", "Refined", "Events")
    return Table(f"Largest errors in {stage.kind}", headers, "llrrrll", rows)


def event_counts_table(report: Report) -> Table:
    """Kinds that happened, and what they mean."""
    rows = [
        (kind, f"{count:,}", EVENT_KINDS.get(kind, ""))
        for kind, count in sorted(report.event_counts.items(), key=lambda item: (-item[1], item[0]))
        if count
    ]
    return Table("Event counts", ("Event", "Count", "Meaning"), "lrl", rows)


def events_table(report: Report) -> Table:
    rows = [
        (event.kind, event.where, event.message, "; ".join(f"{key} {value}" for key, value in facts(event.data)))
        for event in report.events[:MOST_EVENTS]
    ]
    return Table("Events", ("Event", "Where", "What happened", "Numbers"), "llll", rows)


def round_trip_table(report: Report) -> Table | None:
    trip = report.round_trip
    if trip is None:
        return None
    row = (
        "passed" if trip.passed else "failed",
        trip.loader,
        f"{trip.tokens:,}",
        number(trip.max_abs_logit_difference),
        number(trip.mean_kl),
        number(trip.bound),
    )
    headers = ("Verdict", "Loader", "Tokens", "Largest logit difference", "Mean KL (nats)", "Mean KL allowed")
    return Table("Round trip", headers, "llrrrr", [row])


def facts(mapping: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """A nested mapping as flat (dotted name, text) pairs, in order."""
    pairs: list[tuple[str, str]] = []
    for key, value in mapping.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            pairs += facts(value, f"{name}.")
        elif isinstance(value, (list, tuple)) and any(isinstance(item, Mapping) for item in value):
            pairs += facts({str(position): item for position, item in enumerate(value)}, f"{name}.")
        else:
            pairs.append((name, _fact(name, value)))
    return pairs


def _fact(name: str, value: Any) -> str:
    if value is None or value == "" or value == [] or value == {}:
        return MISSING
    if isinstance(value, (list, tuple)):
        return ", ".join(str(item) for item in value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if name.endswith("bytes"):
        return size(value)
    if name.endswith("seconds"):
        return duration(value)
    return number(value) if isinstance(value, float) else str(value) if name.endswith("seed") else f"{value:,}"


def split_recipe(provenance: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """(everything else, the resolved recipe's text), wherever under provenance the text is."""
    for key in ("recipe_text", "recipe"):
        text = provenance.get(key)
        if isinstance(text, str) and "\n" in text:
            return {name: value for name, value in provenance.items() if name != key}, text
    return dict(provenance), ""
