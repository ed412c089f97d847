"""What was not tested, one sentence each, worked out from the report: a reader must not take silence for a good result.

Every sentence follows from facts of this report; where a fact is missing, nothing is said about it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from compress.reports.report import Report
from compress.reports.standing import NOTHING, Standing

_RUNTIMES = ("vllm", "sglang", "tensorrt", "tgi", "llama.cpp")
_FEW_TOKENS = 10_000
"""Tokens of an evaluation text below which it is called short: an interval says how far numbers vary among windows of
this text, not how far the text stands for others."""


def limits(report: Report, standing: Standing = NOTHING) -> list[str]:
    """All of them, the gravest first. `standing`: what has happened since, such as being served."""
    parts = (_verdict, _texts, _contexts, _abilities, partial(_served, standing=standing), _where, _memory, _judged)
    return [sentence for part in (*parts, _source) for sentence in part(report)]


def _verdict(report: Report) -> Iterator[str]:
    if report.verdict != "passed":
        yield f"The verdict is {report.verdict}: this model has not earned release."
    missed = [gate.measure for gate in report.gates if gate.tier == "advisory" and gate.verdict != "passed"]
    if missed:
        yield f"Advisory gates decide nothing, and these did not pass: {', '.join(missed)}."


def _texts(report: Report) -> Iterator[str]:
    names = text_names(report)
    if not names:
        yield "Quality was not measured on any text."
        return
    if len(names) == 1:
        yield (
            f"Quality was measured on one text only, {names[0]}; other subjects, other languages, code and dialogue "
            "were not tried beyond what it holds."
        )
    else:
        yield (
            f"Quality was measured on {', '.join(names)} only; other languages, code and dialogue were not tried "
            "beyond what they hold."
        )
    tokens = [
        (str(item.get("set", item.get("name", "?"))), _count(item, "tokens_obtained", "tokens"))
        for item in report.evaluation
    ]
    short = [f"{name} ({count:,} tokens)" for name, count in tokens if count is not None and count < _FEW_TOKENS]
    if short:
        yield f"Little text was read: {', '.join(short)}. Intervals tell how windows of this text vary, no more."
    if not any(name.startswith("divergence.") for name in report.measurements.compressed):
        yield "Divergence from the source was not measured: equal perplexity can hide answers that changed."
    if not report.noise:
        yield "The noise floor was not measured, so small differences may be those of arithmetic."


def text_names(report: Report) -> list[str]:
    """Sets as measurements name them, where they do; else the text's own name."""
    measured: dict[str, None] = {}
    for name in report.measurements.compressed:
        family, _, rest = name.partition(".")
        if family == "perplexity":
            measured[rest] = None
        elif family == "divergence":
            measured[rest.rpartition(".")[0]] = None
    return list(measured) or [str(item.get("set", item.get("name", "?"))) for item in report.evaluation]


def _contexts(report: Report) -> Iterator[str]:
    windows = [count for item in report.evaluation if (count := _count(item, "window_tokens")) is not None]
    if not windows:
        return
    longest = max(windows)
    beyond = []
    if report.memory.context > longest:
        beyond.append(f"memory is reported for {report.memory.context:,}")
    if report.memory.max_context and report.memory.max_context > longest:
        beyond.append(f"the model declares {report.memory.max_context:,}")
    if beyond:
        yield f"No context beyond {longest:,} tokens was evaluated, though {' and '.join(beyond)}."


def _abilities(report: Report) -> Iterator[str]:
    if report.tasks:
        names = ", ".join(task.name for task in report.tasks)
        yield f"Of abilities, only those that {names} ask for were tried."
        part = [
            f"{task.items:,} of {task.available:,} of {task.name}"
            for task in report.tasks
            if task.items < task.available
        ]
        if part:
            yield f"Not every item was asked: {', '.join(part)}."
        seen = [task.name for task in report.tasks if task.overlap_with_calibration > 0]
        if seen:
            yield f"Calibration windows hold some of the wording of {', '.join(seen)}."
    elif not any(name.startswith("task.") for name in report.measurements.compressed):
        yield "No task benchmarks (questions, code, tool use) were run."
    if report.answers is None and not any(task.type == "generation" for task in report.tasks):
        yield "No text written by the model was looked at: windows are scored, which hides loops and refusals."
    yield "Safety and bias of the answers were not measured; compression can change both."


def _served(report: Report, standing: Standing) -> Iterator[str]:
    timed = any(name.startswith("latency.") for name in report.measurements.compressed)
    if standing.served is not None:
        yield f"Latency under load was not measured; the tokens a second of {standing.served.runtime} are of one try."
    elif timed:
        yield "Speed was measured in transformers only, which unpacks weights; other runtimes have other kernels."
    else:
        yield "Speed, that is latency and throughput, was not measured."
    if report.round_trip is None:
        yield "The exported files were not reloaded through their public loader."
    elif standing.served is None and not any(runtime in report.round_trip.loader.lower() for runtime in _RUNTIMES):
        yield f"No serving runtime such as vLLM has loaded the files; what did is {report.round_trip.loader}."
    if any(event.kind == "fused_apart" for event in report.events):
        yield "vLLM does not serve these files: parts of matrices that it fuses have schemes of their own."


def _where(report: Report) -> Iterator[str]:
    machine = report.provenance.get("machine")
    device = (
        str(machine.get("device", "")) if isinstance(machine, Mapping) else str(report.provenance.get("device", ""))
    )
    if device.startswith("cpu"):
        dtype = machine.get("compute_dtype") if isinstance(machine, Mapping) else None
        arithmetic = f" in {dtype}" if dtype else ""
        yield f"Everything was computed on a CPU{arithmetic}; a GPU's kernels and its 16-bit arithmetic were not tried."


def _memory(report: Report) -> Iterator[str]:
    memory = report.memory
    parts = (("weights as loaded", memory.resident), ("the KV cache", memory.kv_cache))
    missing = [name for name, both in parts if both.measured is None]
    if missing:
        yield f"Memory of {' and '.join(missing)} is predicted, not measured."
    if memory.kv_cache.measured is not None and "scaled" in memory.kv_cache.note:
        yield (
            f"The KV cache of {memory.context:,} tokens x {memory.concurrency} was {memory.kv_cache.note}, not filled; "
            "activations and the runtime's own memory come on top."
        )


def _judged(report: Report) -> Iterator[str]:
    points = [
        gate.measure
        for gate in report.gates
        if gate.interval is None and gate.measure.partition(".")[0] in ("perplexity", "divergence", "task")
    ]
    if points:
        yield f"Judged without an interval, as if there were no chance in them: {', '.join(points)}."
    bounded = {name for gate in report.gates for name in _sets_of(gate.measure)}
    ungated = [name for name in text_names(report) if name not in bounded]
    if report.gates and ungated:
        yield f"Measured, but bounded by no gate: {', '.join(ungated)}."


def _sets_of(measure: str) -> tuple[str, str]:
    """What the set of a measure could be called: `perplexity.<set>`, `divergence.<set>.<what>`; sets may hold dots."""
    rest = measure.partition(".")[2]
    return rest, rest.rpartition(".")[0]


def _source(report: Report) -> Iterator[str]:
    if report.event_counts.get("calibration_unknown"):
        yield "What this model was calibrated on is not known; it may be the very text that it was judged on."
    if report.event_counts.get("source_was_quantized"):
        yield "The source weights came from a quantized file; comparisons are with that source, not its origin."
    if report.event_counts.get("task_skipped"):
        yield "A task was not asked; the event task_skipped says why."


def _count(item: Mapping[str, Any], *keys: str) -> int | None:
    for key in keys:
        value = item.get(key)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None
