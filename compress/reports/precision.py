"""How many bits each linear got, and what the budget bought: from what `mixed_precision` tells of itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from compress.reports import maps, pruning, scaling
from compress.reports.report import Report, StageRecord
from compress.reports.tables import Table
from compress.reports.words import everywhere, number, size

OWN = ("units", "uniform")
"""Facts that are shown here rather than listed."""


def planners(report: Report) -> list[StageRecord]:
    """Stages that chose schemes."""
    return [stage for stage in report.stages if "units" in stage.facts]


def listed(stage: StageRecord) -> dict[str, Any]:
    """Facts without those that have a picture or table of their own."""
    facts = scaling.summary(stage.facts)
    found = {key: value for key, value in facts.items() if key not in (*OWN, *pruning.OWN)}
    if "fit" in found:
        found["fit"] = {key: value for key, value in found["fit"].items() if key not in ("predicted", "measured")}
    return found


def sentence(facts: Mapping[str, Any]) -> str:
    """What was asked, what came of it, and what it was compared with."""
    what, whose = ("linears and vocabulary take", " of both") if _outside(facts) else ("linears take", "")
    text = (
        f"Asked for {_asked(facts)}; the {what} {facts['linear_bytes']:,} of {facts['limit_bytes']:,} bytes, "
        f"{facts['effective_bits']:.3f} bits per weight{whose}. On {facts['tuning_tokens']:,} tuning tokens the "
        f"plan's mean KL to the model before it is {number(facts['kl'])} nats"
    )
    isolated = "As solved in isolation: behind compressed inputs, as they ship, divergences are usually lower."
    if facts.get("stop") == "first_pass":
        if facts["plan"] == "uniform":
            return f"{text}. No smaller mixture measured stays within the bounds, so the plan is uniform. {isolated}"
        return f"{text}, its perplexity {facts['perplexity_ratio']:.3f} times. {isolated}"
    uniform = facts["uniform"]
    if facts["plan"] == "uniform":
        return f"{text}. No mixture within the budget was better than one scheme everywhere, so the plan is uniform."
    if not uniform:
        return f"{text}; no uniform candidate fits the budget."
    best = min(uniform, key=lambda each: float(each["kl"]))
    share = facts["kl"] / best["kl"] if best["kl"] else float("nan")
    return (
        f"{text}, {share:.2f} times that of the best uniform candidate within the budget ({best['scheme']}). Both as "
        "solved in isolation: behind compressed inputs, as they ship, the difference is usually smaller."
    )


def _asked(facts: Mapping[str, Any]) -> str:
    budget = facts.get("budget")
    amount = ""
    if budget:
        value = f"{budget['amount']:,.0f}" if budget["kind"].endswith("bytes") else f"{budget['amount']:g}"
        amount = f"{budget['kind'].replace('_', ' ')} {value}"
    if facts.get("stop") != "first_pass":
        return amount
    bounds = f"the smallest within {facts['share_of_bounds']:g} of {facts['bounds']}"
    return f"{bounds}, and at most {amount}" if amount else bounds


def _outside(facts: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The embedding and the head, where they were chosen for."""
    return [unit for unit in facts["units"] if unit["block"] is None]


def trust(facts: Mapping[str, Any]) -> str:
    """How far predictions can be believed."""
    fit = facts["fit"]
    if fit["r2"] is None:
        return "Too few different choices were measured to say how well predictions agree with measurements."
    return (
        f"Predicted against measured KL over {len(fit['measured'])} choices: R² {fit['r2']:.3f} of the logarithms, "
        f"rank correlation {number(fit['rank'])}."
    )


def bought_table(facts: Mapping[str, Any]) -> Table:
    """The plan beside uniform choices within the budget."""
    rows = [
        (
            f"the plan ({facts['plan']})",
            size(facts["linear_bytes"]),
            f"{facts['effective_bits']:.3f}",
            number(facts["kl"]),
        )
    ]
    bits = facts["effective_bits"] / facts["linear_bytes"]
    rows += [
        (everywhere(each["scheme"]), size(each["bytes"]), f"{bits * each['bytes']:.3f}", number(each["kl"]))
        for each in sorted(facts["uniform"], key=lambda each: -each["bytes"])
    ]
    what = "Linears and vocabulary" if _outside(facts) else "Linears"
    return Table("What the budget bought", ("Choice", what, "Bits", "Mean KL, tuning (nats)"), "lrrr", rows)


def schemes_table(facts: Mapping[str, Any]) -> Table:
    """How many units of each kind got each scheme."""
    counts = Counter((unit["kind"], unit["scheme"]) for unit in facts["units"])
    kinds = list(dict.fromkeys(unit["kind"] for unit in facts["units"]))
    schemes = sorted({unit["scheme"] for unit in facts["units"]})
    rows = [(scheme, *(str(counts[kind, scheme] or "") for kind in kinds)) for scheme in schemes]
    return Table("Schemes by kind", ("Scheme", *kinds), "l" + "r" * len(kinds), rows)


def bits_map(units: Sequence[Mapping[str, Any]]) -> list[Markup]:
    """Bits of linears in each cell; the bar under it is the square root of what the unit's smallest candidate would
    cost, as a share of the largest."""
    units = [unit for unit in units if unit["block"] is not None]
    most = max((float(unit["sensitivity"]) for unit in units), default=0.0) or 1.0
    cells = [
        maps.Cell(
            kind=unit["kind"],
            block=unit["block"],
            style=f"bits{unit['bits']}",
            text=str(unit["bits"]),
            title=f"{unit['name']}: {unit['scheme']}, predicted to cost {number(unit['cost'])} nats, "
            f"{number(unit['sensitivity'])} at its smallest candidate",
            bar=(float(unit["sensitivity"]) / most) ** 0.5,
        )
        for unit in units
    ]
    return maps.pieces(cells, "bits of each linear by block, and how sensitive it is")


def shown(report: Report) -> list[dict[str, Any]]:
    """What the HTML page shows of each such stage."""
    return [
        {
            "sentence": sentence(stage.facts),
            "trust": trust(stage.facts),
            "pictures": bits_map(stage.facts["units"]),
            "tables": [bought_table(stage.facts), schemes_table(stage.facts)],
        }
        for stage in planners(report)
    ]
