"""The Markdown page for a result of peers.py: quality, cost, and the ratios of our candidates to every peer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; all but the first column are aligned right."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, rule, *rows])


def quality(result: Mapping[str, Any]) -> str:
    """Return one table per evaluation text, best mean KL first."""
    parts = []
    for text, scores in result["quality"].items():
        rows = [
            [
                name, f"{score['mean_kl']:.4f}", f"{score['median_kl']:.4f}", f"{score['p99_kl']:.3f}",
                f"{score['top1_agreement']:.2%}", f"{score['perplexity']:.2f}",
            ]
            for name, score in sorted(scores.items(), key=lambda item: float(item[1]["mean_kl"]))
        ]  # fmt: skip
        head = ["", "mean KL", "median KL", "p99 KL", "top-1 agreement", "perplexity"]
        parts.append(f"### {text}\n\n{table(head, rows)}")
    return "\n\n".join(parts)


def cost(result: Mapping[str, Any]) -> str:
    """Return seconds and memory of every run that reported them."""
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "version": lambda run: str(run.get("version", "")),
        "quantising, s": lambda run: f"{run['seconds']:.0f}",
        "CPU, s": lambda run: number(run, "cpu_seconds"),
        "export, s": lambda run: number(run, "export_seconds", digits=1),
        "peak own memory, GiB": lambda run: number(run, "peak_rss_bytes", 2**30, 2),
        "peak resident, GiB": lambda run: number(run, "vm_hwm_bytes", 2**30, 2),
        "file, MiB": lambda run: number(run, "exported_bytes", 2**20),
        "threads": lambda run: number(run, "threads"),
    }
    rows = [[name, *(show(run) for show in columns.values())] for name, run in result["runs"].items()]
    return table(["", *columns], rows)


def number(run: Mapping[str, Any], key: str, unit: float = 1, digits: int = 0) -> str:
    """Return run[key] in the unit, or "-" for a candidate that did not say."""
    return f"{run[key] / unit:.{digits}f}" if key in run else "-"


def ratios(result: Mapping[str, Any]) -> str:
    """Return, per candidate, its mean KL, time and memory divided by each peer's: below 1 is better than the peer."""
    ours = list(result["candidates"])
    peers = [name for name in result["runs"] if name not in ours]
    texts = list(result["quality"])
    rows = []
    for name in ours:
        for peer in peers:
            kl = [result["quality"][text][name]["mean_kl"] / result["quality"][text][peer]["mean_kl"] for text in texts]
            row = [f"{name} / {peer}", *(f"{value:.2f}" for value in kl)]
            for key in ("seconds", "peak_rss_bytes"):
                mine = result["runs"].get(name, {}).get(key)
                row.append(f"{mine / result['runs'][peer][key]:.2f}" if mine else "-")
            rows.append(row)
    return table(["ratio, below 1 is better", *(f"mean KL, {text}" for text in texts), "seconds", "memory"], rows)


def provenance(result: Mapping[str, Any]) -> str:
    """Return the paragraph that says on what, where and how everything was measured."""
    machine, calibration = result["machine"], result["calibration"]
    evaluated = ", ".join(f"{name} ({shape[0]} x {shape[1]})" for name, shape in result["evaluation"].items())
    return (
        f"{result['date']}; {machine['cpu']}, {machine['threads']} threads, {machine['memory_gib']:.0f} GiB; "
        f"Python {machine['python']}, {machine['system']}. Source: {result['model']['name']} "
        f"({result['model']['sha256'][:12]}). Calibration: {calibration['windows']} windows of {calibration['tokens']} "
        f"tokens, the same ids for all ({calibration['sha256'][:12]}). Evaluation windows: {evaluated}. lm_head and "
        "embeddings are left alone. Everything runs in float32 on the CPU. KL is KL(source || candidate) per token, in "
        "nats, over the full vocabulary."
    )


def packages(result: Mapping[str, Any]) -> str:
    """Return one line of package versions per distinct environment."""
    lines: dict[str, list[str]] = {}
    for name, run in {**result["runs"], "judge": {"packages": result["machine"]["judge"]}}.items():
        text = ", ".join(f"{package} {version}" for package, version in run.get("packages", {}).items())
        lines.setdefault(text, []).append(name)
    return "\n".join(f"* {', '.join(names)}: {text}" for text, names in lines.items() if text)


COST_NOTE = (
    "Seconds count the quantising call alone, after the model is loaded. Own memory is the peak of anonymous memory "
    "during that call, sampled every 20 ms; resident is the process's peak with mapped files, from start to export. "
    "Where CPU seconds are far below threads x seconds, the method is serial or the machine was busy otherwise."
)


def markdown(result: Mapping[str, Any]) -> str:
    """Return the whole page."""
    title = f"# {result['bits']}-bit, group {result['group_size']}, symmetric: side by side with peers"
    sections = [title, provenance(result), "## Quality", quality(result), "## Cost", cost(result), COST_NOTE]
    if result["candidates"]:
        sections += ["## Ratios", ratios(result)]
    if result["failures"]:
        sections += ["## Failed", "\n".join(f"* {name}" for name in result["failures"])]
    return "\n\n".join([*sections, "## Versions", packages(result)]) + "\n"
