"""Numbers and sentences as people read them, shared by every face of a report."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from compress.reports.report import Report

MISSING = "–"
MOST_EVENTS = 200
MEASURES: dict[str, str] = {
    "weight_bytes": "Weights",
    "effective_bits": "Effective bits per weight of quantized linears",
    "perplexity": "Perplexity",
    "mean_kl": "KL divergence, mean (nats per token)",
    "median_kl": "KL divergence, median",
    "kl_p50": "KL divergence, median",
    "kl_p99": "KL divergence, 99th percentile",
    "kl_p999": "KL divergence, 99.9th percentile",
    "max_kl": "KL divergence, largest",
    "resident_bytes": "Weights, loaded",
    "kv_cache_bytes": "KV cache",
    "top1_agreement": "Same most likely token",
    "accuracy": "Accuracy",
    "accuracy_norm": "Accuracy by likelihood per character",
    "nll": "Nats of a whole answer",
    "prefill_seconds": "Reading the prompt",
    "decode_seconds": "Each token written",
}
ORDER = list(MEASURES)

# Control characters that XML and HTML cannot hold, lone surrogates that UTF-8 cannot, and the marks that make text read
# in another order than it is written.
_UNSHOWABLE = re.compile(
    "[^\t\n\r\u0020-\u007e\u0085-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]|[\u202a-\u202e\u2066-\u2069]"
)


def size(count: float | None) -> str:
    """Bytes as MiB or GiB; less than a tenth of a MiB as KiB."""
    if count is None or not math.isfinite(count):
        return MISSING
    if abs(count) >= 1 << 30:
        return f"{count / (1 << 30):.2f} GiB"
    mebibytes = count / (1 << 20)
    if 0 < abs(mebibytes) < 0.1:
        return f"{count / 1024:.1f} KiB"
    return f"{mebibytes:.1f} MiB" if abs(mebibytes) >= 10 else f"{mebibytes:.2f} MiB"


def everywhere(label: str) -> str:
    """A uniform choice in words, of `Choices.label`: 'Q4_K everywhere', or with what embedding and head have beside it,
    'Q4_K in all linears; lm_head Q6_K'."""
    linears, semicolon, outside = label.partition("; ")
    return f"{linears} in all linears; {outside}" if semicolon else f"{linears} everywhere"


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
    if name.endswith("_seconds"):
        return f"{1000 * value:.4g} ms" if value < 1 else duration(value)
    return percent(value) if name.endswith(("top1_agreement", "accuracy", "accuracy_norm")) else number(value)


def interval_text(name: str, interval: tuple[float, float] | None) -> str:
    return MISSING if interval is None else f"{measured(name, interval[0])} to {measured(name, interval[1])}"


def source_name(source: Mapping[str, Any]) -> str:
    """A source as people outside the machine may know it: a hub id, a package's file, or the last part of a path."""
    if source.get("id"):
        return str(source["id"])
    name = str(source.get("name") or "")
    return (PurePath(name).name if name.startswith(("/", "~", ".")) else name) or MISSING


def headline(report: Report) -> str:
    """The verdict in one sentence. Gates that only inform are left out of it."""
    who = f"{report.artifact.name} {report.artifact.version}".strip()
    if not report.gates:
        return f"{who} was judged by no gate at all; the verdict is {report.verdict}."
    critical = [gate for gate in report.gates if gate.tier == "critical"]
    failed = [gate.measure for gate in critical if gate.verdict == "failed"]
    if report.verdict == "passed":
        return f"{who} met {_all(len(critical))}{_shrunk(report)}."
    if failed:
        return f"{who} failed {_of(len(failed), len(critical))}: {', '.join(failed)}."
    undecided = [gate.measure for gate in critical if gate.verdict == "inconclusive"]
    doubtful = [gate.measure for gate in report.gates if gate.tier == "supporting" and gate.verdict == "failed"]
    said = []
    if undecided:
        said.append(f"{_of(len(undecided), len(critical))} could not be decided: {', '.join(undecided)}")
    if doubtful:
        said.append(f"what a person must decide about: {', '.join(doubtful)} missed a supporting bound")
    return f"{who} failed no critical gate, but {'; '.join(said)}."


def about(report: Report) -> str:
    """What kind of report this is, where it is not that of a run; else nothing."""
    judged = report.judged
    if judged is None:
        return ""
    return (
        f"This is an evaluation: {judged.model} was judged by the gates of a recipe, and nothing was compressed. "
        f"Wherever this report says source, it means {judged.reference}."
    )


def _all(count: int) -> str:
    return "its only gate" if count == 1 else f"all {count} gates"


def _of(count: int, total: int) -> str:
    return f"{count} of {total} gates" if total > 1 else "its only gate"


def _shrunk(report: Report) -> str:
    before, after = (getattr(report.measurements, side).get("weight_bytes") for side in ("source", "compressed"))
    return f", with {size(after)} of weights in place of {size(before)}" if before and after else ""


def showable(text: str) -> str:
    """`text` with every character that a face cannot show safely replaced by U+FFFD."""
    return _UNSHOWABLE.sub("\ufffd", text)
