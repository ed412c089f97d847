"""What a report says, as words and tables, and its Markdown face.

The tables are built once, here, from a `Report`; `html.py` and `card.py` draw the same ones. Only faces turn bytes into
MiB, seconds into minutes and fractions into per cent. Names and recipes come from outside and may hold anything, so
every piece of text is escaped where it is placed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compress.events import EVENT_KINDS
from compress.reports.report import PredictedMeasured, Report, StageRecord

MISSING = "–"
MOST_EVENTS = 200
_MEASURES: dict[str, str] = {
    "weight_bytes": "Weights",
    "effective_bits": "Effective bits per quantized weight",
    "perplexity": "Perplexity",
    "mean_kl": "KL divergence, mean (nats per token)",
    "median_kl": "KL divergence, median",
    "kl_p50": "KL divergence, median",
    "kl_p99": "KL divergence, 99th percentile",
    "kl_p999": "KL divergence, 99.9th percentile",
    "top1_agreement": "Same most likely token",
    "accuracy": "Accuracy",
}
_ORDER = list(_MEASURES)

# Control characters that XML and HTML cannot hold, lone surrogates that UTF-8 cannot, and the marks that make text read
# in another order than it is written.
_UNSHOWABLE = re.compile(
    "[^\t\n\r\u0020-\u007e\u0085-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]|[\u202a-\u202e\u2066-\u2069]"
)


@dataclass(frozen=True)
class Table:
    """Rows of finished text. `align` holds one letter per column: l for words, r for numbers."""

    title: str
    headers: tuple[str, ...]
    align: str
    rows: Sequence[tuple[str, ...]]


# --- numbers as people read them --------------------------------------------------------------------------------------


def size(count: float | None) -> str:
    """Bytes as MiB or GiB."""
    if count is None or not math.isfinite(count):
        return MISSING
    if abs(count) >= 1 << 30:
        return f"{count / (1 << 30):.2f} GiB"
    mebibytes = count / (1 << 20)
    return f"{mebibytes:.1f} MiB" if abs(mebibytes) >= 10 else f"{mebibytes:.2f} MiB"


def number(value: float | None) -> str:
    """Four digits that matter, with thousands separated."""
    if value is None:
        return MISSING
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def percent(fraction: float | None) -> str:
    return MISSING if fraction is None else f"{100 * fraction:.1f} %"


def duration(seconds: float | None) -> str:
    if seconds is None or not math.isfinite(seconds):
        return MISSING
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 1 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def measured(name: str, value: float | None) -> str:
    """One measurement in the unit its flat name stands for."""
    if value is None:
        return MISSING
    if name.endswith("bytes"):
        return size(value)
    return percent(value) if name.endswith(("top1_agreement", "accuracy")) else number(value)


def interval_text(name: str, interval: tuple[float, float] | None) -> str:
    return MISSING if interval is None else f"{measured(name, interval[0])} to {measured(name, interval[1])}"


# --- sentences --------------------------------------------------------------------------------------------------------


def headline(report: Report) -> str:
    """The verdict in one sentence."""
    who = f"{report.artifact.name} {report.artifact.version}"
    undecided = [gate for gate in report.gates if gate.verdict == "inconclusive"]
    failed = [gate for gate in report.gates if gate.verdict == "failed"]
    if not report.gates:
        return f"{who} was judged by no gate at all; the verdict is {report.verdict}."
    if report.verdict == "passed":
        return f"{who} met {_all(len(report.gates))}{_shrunk(report)}."
    if failed:
        return f"{who} failed {_of(len(failed), len(report.gates))}: {', '.join(gate.measure for gate in failed)}."
    what = ", ".join(gate.measure for gate in undecided)
    return f"{who} failed nothing, but {_of(len(undecided), len(report.gates))} could not be decided: {what}."


def limits(report: Report) -> list[str]:
    """What was not tested, one sentence each. A reader must not take silence for a good result."""
    said: list[str] = []
    if report.verdict != "passed":
        said.append(f"The verdict is {report.verdict}: this model has not earned release.")
    sets = [str(item.get("name", "?")) for item in report.evaluation]
    said.append(
        f"Quality was measured on {', '.join(sets)} only; other text, languages and longer contexts were not tried."
        if sets
        else "Quality was not measured on any text."
    )
    if not any(name.startswith("task.") for name in report.measurements.compressed):
        said.append("No task benchmarks (questions, code, tool use) were run.")
    said.append("Speed when served, and safety or bias of the answers, were not measured; compression can change both.")
    if report.round_trip is None:
        said.append("The exported files were not reloaded through their public loader.")
    if report.event_counts.get("source_was_quantized"):
        said.append("The source weights came from a quantized file; comparisons are with that source, not its origin.")
    return said


def _all(count: int) -> str:
    return "its only gate" if count == 1 else f"all {count} gates"


def _of(count: int, total: int) -> str:
    return f"{count} of {total} gates" if total > 1 else "its only gate"


def _shrunk(report: Report) -> str:
    before, after = (getattr(report.measurements, side).get("weight_bytes") for side in ("source", "compressed"))
    return f", with {size(after)} of weights in place of {size(before)}" if before and after else ""


# --- tables -----------------------------------------------------------------------------------------------------------


def gates_table(report: Report) -> Table:
    rows = [
        (
            gate.verdict,
            gate.measure,
            _observed(gate.kind, gate.measure, gate.observed),
            MISSING
            if gate.interval is None
            else " to ".join(_observed(gate.kind, gate.measure, end) for end in gate.interval),
            gate.limit,
            gate.sentence,
        )
        for gate in report.gates
    ]
    headers = ("Verdict", "Measure", "Observed", "Interval", "Limit", "In words")
    return Table("Gates", headers, "llrrll", rows)


def _observed(kind: str, measure: str, value: float | None) -> str:
    """Relative gates observe a ratio, whatever unit the measure has; it is shown bare, as its limit is."""
    if value is None:
        return "not measured"
    return size(value) if kind == "threshold" and measure.endswith("bytes") and value >= 1 << 20 else number(value)


def quality_tables(report: Report) -> list[Table]:
    """Before and after: one table for the whole model, then one for each evaluation set."""
    groups: dict[str, list[str]] = {"": []}
    for name in dict.fromkeys([*report.measurements.compressed, *report.measurements.source]):
        groups.setdefault(_group(name), []).append(name)
    headers = ("Measure", "Source", "Compressed", "Change", "95 % interval")
    return [
        Table(
            group or "Whole model", headers, "lrrrr", [_quality_row(report, name) for name in sorted(names, key=_rank)]
        )
        for group, names in groups.items()
        if names
    ]


def measures_by_set(measurements: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """{set: {measure without the set: value}}; measures of the whole model are under ""."""
    found: dict[str, dict[str, float]] = {}
    for name in sorted(measurements, key=_rank):
        found.setdefault(_group(name), {})[_what(name)] = measurements[name]
    return found


def label(what: str) -> str:
    """A measure in words: `kl_p99` is "KL divergence, 99th percentile"."""
    return _MEASURES.get(what, what.replace("_", " "))


def _group(name: str) -> str:
    """`perplexity.<set>` and `divergence.<set>.<what>` belong to <set>; set names may hold dots."""
    family, _, rest = name.partition(".")
    return rest if family == "perplexity" else rest.rpartition(".")[0]


def _what(name: str) -> str:
    return "perplexity" if name.startswith("perplexity.") else name.rpartition(".")[2]


def _rank(name: str) -> tuple[int, str]:
    what = _what(name)
    return (_ORDER.index(what) if what in _ORDER else len(_ORDER), name)


def _quality_row(report: Report, name: str) -> tuple[str, ...]:
    before, after = report.measurements.source.get(name), report.measurements.compressed.get(name)
    return (
        label(_what(name)),
        measured(name, before),
        measured(name, after),
        _change(name, before, after),
        interval_text(name, report.measurements.intervals.get(name)),
    )


def _change(name: str, before: float | None, after: float | None) -> str:
    if not before or after is None or not math.isfinite(after / before):
        return MISSING
    if name.endswith(("accuracy", "top1_agreement")):
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
            stage.kind,
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
    """'solve 61 %, forward 30 %', the longest first."""
    total = sum(parts.values())
    if total <= 0:
        return ""
    ordered = sorted(parts.items(), key=lambda part: -part[1])
    return ", ".join(f"{name} {100 * seconds / total:.0f} %" for name, seconds in ordered)


def worst_table(stage: StageRecord, most: int = 8) -> Table:
    """The linears whose output changed most, the worst first."""
    known = [module for module in stage.modules if module.error is not None and math.isfinite(module.error)]
    worst = sorted(known, key=lambda module: -(module.error or 0.0))[:most]
    rows = [
        (
            module.name,
            module.scheme,
            number(module.error),
            number(module.rounding_error),
            number(module.damping),
            ", ".join(module.events) or MISSING,
        )
        for module in worst
    ]
    headers = ("Linear", "Scheme", "Error", "Plain rounding", "Damping", "Events")
    return Table(f"Largest errors in {stage.kind}", headers, "llrrrl", rows)


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


# --- Markdown ---------------------------------------------------------------------------------------------------------


def showable(text: str) -> str:
    """`text` with every character that a face cannot show safely replaced by U+FFFD."""
    return _UNSHOWABLE.sub("\ufffd", text)


def escape(text: object) -> str:
    """Text for one place in a Markdown line: no markup, no HTML, no line breaks."""
    flat = " ".join(showable(str(text)).split())
    flat = flat.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*\[\]|~#])", r"\\\1", flat)


def fence(text: str, language: str = "") -> str:
    """`text` as a code block whose fence is longer than any run of backticks inside."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    ticks = "`" * max(3, longest + 1)
    return f"{ticks}{language}\n{showable(text).rstrip()}\n{ticks}"


def table_text(table: Table) -> str:
    """One table in Markdown, without its title."""
    rule = " | ".join("---:" if letter == "r" else "---" for letter in table.align)
    lines = [" | ".join(table.headers), rule, *(" | ".join(map(escape, row)) for row in table.rows)]
    return "\n".join(f"| {line} |" for line in lines)


def render_markdown(report: Report) -> str:
    """The whole report as Markdown (GitHub tables)."""
    rest, recipe = split_recipe(report.provenance)
    trip = round_trip_table(report)
    parts = [f"# {report.verdict.capitalize()}: {escape(headline(report))}"]
    parts += _section("Gates", [gates_table(report)])
    parts += ["## Before and after", *_titled(quality_tables(report))]
    parts += ["## Error per block", *_titled(worst_table(stage) for stage in report.stages if stage.modules)]
    parts += _section("Memory", [memory_table(report)])
    parts += _section("Stages", [stages_table(report)])
    parts.append("Steps of the run: " + escape("; ".join(_steps(report))) + ".")
    parts += _section("Events", [event_counts_table(report), events_table(report)])
    if len(report.events) > MOST_EVENTS:
        parts.append(f"The first {MOST_EVENTS} of {len(report.events):,} events; events.jsonl holds all.")
    parts += _section("Round trip", [trip] if trip else [])
    parts += ["## Limits", "\n".join(f"- {escape(limit)}" for limit in limits(report))]
    parts += ["## Calibration", _facts_text(report.calibration)]
    parts += ["## Evaluation", *(_facts_text(item) for item in report.evaluation)]
    artifact = {"artifact": report.artifact.model_dump()}
    parts += ["## Provenance", _facts_text({**artifact, **rest})]
    parts += ["## Recipe", fence(recipe, "yaml")] if recipe else []
    return "\n\n".join(part for part in parts if part) + "\n"


def _section(title: str, tables: list[Table]) -> list[str]:
    texts = [table_text(table) for table in tables if table.rows]
    return [f"## {title}", *(texts or ["None."])]


def _titled(tables: Iterable[Table]) -> list[str]:
    return [f"### {escape(table.title)}\n\n{table_text(table)}" for table in tables if table.rows] or ["None."]


def _steps(report: Report) -> list[str]:
    return [f"{step} {duration(seconds)}" for step, seconds in report.seconds_by_step.items()]


def _facts_text(mapping: Mapping[str, Any]) -> str:
    return table_text(Table("", ("What", "Value"), "ll", facts(mapping)))
