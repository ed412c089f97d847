"""What pruning took out, what refitting gave back, and whether quantising alone would have been better."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compress.reports.report import AlternativeRecord, Report, StageRecord
from compress.reports.tables import Table, label, measures_by_set
from compress.reports.words import MISSING, measured, number, percent, size

OWN = ("counts", "parameters", "block_parameters", "removed_blocks", "pruned")
"""Facts that are shown here rather than listed."""
PIECES = {"blocks": "Blocks", "kv_heads": "KV heads in each block", "mlp_channels": "MLP channels in each block"}


def pruners(report: Report) -> list[StageRecord]:
    """Stages that took pieces out of the model."""
    return [stage for stage in report.stages if "block_parameters" in stage.facts]


def sentence(facts: Mapping[str, Any]) -> str:
    """How much smaller the model became."""
    (before, after), (blocks_before, blocks_after) = facts["parameters"], facts["block_parameters"]
    return (
        f"{before - after:,} of {before:,} parameters went, {percent(1 - after / before)}; of the parameters in blocks "
        f"{percent(1 - blocks_after / blocks_before)}. {_how(facts)}"
    )


def _how(facts: Mapping[str, Any]) -> str:
    """How pieces were chosen, and what became of the KV cache."""
    said = []
    if facts.get("removed_blocks"):
        said.append("Blocks were chosen by the divergence without them on tuning windows.")
    if facts.get("pruned"):
        said.append(f"Pieces of blocks were chosen by {facts['importance']} on {facts['tokens']:,} calibration tokens.")
    before, after = (facts["counts"]["blocks"][at] * facts["counts"]["kv_heads"][at] for at in (0, 1))
    if after < before:
        said.append(f"The KV cache takes {percent(after / before)} of what it did, where no block slides.")
    return " ".join(said)


def tables(facts: Mapping[str, Any]) -> list[Table]:
    """What stayed, which blocks went, and the output error of what was refitted."""
    rows = [
        (PIECES[name], f"{before:,}", f"{after:,}")
        for name, (before, after) in facts["counts"].items()
        if before != after
    ]
    found = [Table("What stayed", ("Pieces", "Before", "After"), "lrr", rows)]
    if facts.get("removed_blocks"):
        went = [
            (str(number_), str(each["block"]), number(each["influence"]), number(each["kl"]), str(each["tried"]))
            for number_, each in enumerate(facts["removed_blocks"], start=1)
        ]
        headers = ("Order", "Block", "Its influence then", "Mean KL without it (nats)", "Removals tried")
        found.append(Table("Blocks that went, on tuning windows, before any repair", headers, "rrrrr", went))
    if facts.get("pruned"):
        found.append(_errors(facts["pruned"]))
    return found


def _errors(pruned: list[dict[str, Any]]) -> Table:
    """By kind of linear: output error over all blocks, and the worst of them."""
    rows = []
    for reader in dict.fromkeys(each["reader"] for each in pruned):
        own = [each for each in pruned if each["reader"] == reader]
        worst = max(own, key=lambda each: float(each["error"]))
        mean, plain = (sum(each[key] for each in own) / len(own) for key in ("error", "error_without_refit"))
        where = f"{number(worst['error'])} in block {worst['block']}"
        rows.append((reader, str(len(own)), number(plain), number(mean), where))
    headers = ("Linear", "Blocks", "Error if left alone", "Error as refitted", "Worst")
    return Table("Output error on calibration inputs, mean over blocks", headers, "lrrrr", rows)


def alone_sentence(report: Report, alone: AlternativeRecord) -> str:
    """The answer in words."""
    if alone.scheme is None:
        return (
            "Quantising alone cannot be compared: the smallest scheme takes more than the "
            f"{size(alone.limit_bytes)} of this artifact."
        )
    ours = report.measurements.compressed
    shared = [name for name in alone.values if name.endswith(".mean_kl") and name in ours]
    text = (
        f"At no more bytes than this artifact's {size(alone.limit_bytes)}, the source quantised alone to "
        f"{alone.scheme} takes {size(alone.weight_bytes)}"
    )
    if not shared:
        return f"{text}. No divergence was measured to compare them by."
    said = ", ".join(
        f"{number(alone.values[name])} against {number(ours[name])} nats on {name.split('.', 1)[1][: -len('.mean_kl')]}"
        for name in shared
    )
    return " ".join([f"{text}; its mean KL to the source is {said}.", _answer(report, alone, shared), *alone.caveats])


def _answer(report: Report, alone: AlternativeRecord, shared: list[str]) -> str:
    """Which is better, where this artifact's own intervals do not hold both."""
    ours, intervals = report.measurements.compressed, report.measurements.intervals
    better = worse = 0
    for name in shared:
        low, high = intervals.get(name, (ours[name], ours[name]))
        better += alone.values[name] < low
        worse += alone.values[name] > high
    if better == len(shared):
        return "Quantising alone would have been better."
    if worse == len(shared):
        return "Pruning was worth it at these bytes."
    return "Which is better depends on the text, or is too close to tell on these windows."


def alone_table(report: Report, alone: AlternativeRecord) -> Table:
    """Both, measure by measure."""
    ours = report.measurements.compressed
    theirs: dict[str, float | None] = {"weight_bytes": alone.weight_bytes, **alone.values}
    rows = []
    for name, measures in measures_by_set({flat: 0.0 for flat in theirs}).items():
        for what in measures:
            flat, words = _flat(name, what), f"{name}: {label(what)}" if name else label(what)
            rows.append((words, measured(flat, ours.get(flat)), measured(flat, theirs[flat])))
    headers = ("Measure", "This artifact", f"Only quantised: {alone.scheme or MISSING}")
    return Table("Pruned, or only quantised", headers, "lrr", rows)


def _flat(name: str, what: str) -> str:
    if not name:
        return what
    return f"perplexity.{name}" if what == "perplexity" else f"divergence.{name}.{what}"


def shown(report: Report) -> list[dict[str, Any]]:
    """For the HTML page: a section for each stage that pruned, the comparison in the last."""
    found: list[dict[str, Any]] = [
        {"sentence": sentence(stage.facts), "tables": tables(stage.facts), "alone": ""} for stage in pruners(report)
    ]
    alone = report.quantised_alone
    if found and alone is not None:
        found[-1]["alone"] = alone_sentence(report, alone)
        found[-1]["alone_table"] = alone_table(report, alone)
    return found
