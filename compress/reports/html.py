"""The HTML face: one file that needs nothing else, for a screen of any width, light or dark, and for paper.

The words and tables are those of `markdown.py`, the pictures those of `pictures.py`; the templates only place them.
Jinja escapes every value, and the page's own policy forbids scripts and anything from elsewhere, so a hostile name in a
recipe stays text.
"""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from compress.events import EVENT_KINDS
from compress.reports import answers, pictures, precision, pruning, tables, task_tables, words
from compress.reports.report import Report, StageRecord

_MARKS = {"passed": "✓", "failed": "✗", "inconclusive": "?"}


def pages() -> Environment:
    """Where templates of HTML pages are found, and how they are filled: everything escaped, nothing left undefined."""
    environment = Environment(
        loader=PackageLoader("compress.reports", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(size=words.size, number=words.number, duration=words.duration)
    return environment


def render_html(report: Report) -> str:
    """The whole report as one HTML document."""
    environment = pages()
    rest, recipe = tables.split_recipe(report.provenance)
    page = environment.get_template("report.html.j2").render(
        report=report,
        marks=_MARKS,
        headline=words.headline(report),
        about=words.about(report),
        tiles=_tiles(report),
        gates=tables.gates_table(report),
        quality=[*tables.quality_tables(report), *([tables.noise_table(report)] if report.noise else [])],
        tasks=task_tables.tasks_table(report),
        flips=task_tables.flips_tables(report),
        answers=answers.shown(report.answers) if report.answers else [],
        answers_said=answers.introduction(report.answers) if report.answers else "",
        answers_same=answers.UNCHANGED,
        errors=[_errors(stage) for stage in report.stages if any(each.error is not None for each in stage.modules)],
        pruned=pruning.shown(report),
        plans=precision.shown(report),
        memory=tables.memory_table(report),
        stages=tables.stages_table(report),
        splits=[_split(stage.kind, stage.seconds_by_part) for stage in report.stages if stage.seconds_by_part],
        stage_facts=[(stage.kind, tables.facts(precision.listed(stage))) for stage in report.stages if stage.facts],
        steps=_split("the whole run", report.seconds_by_step),
        event_counts=tables.event_counts_table(report),
        absent=[kind for kind in EVENT_KINDS if not report.event_counts.get(kind)],
        events=tables.events_table(report),
        round_trip=tables.round_trip_table(report),
        limits=words.limits(report),
        calibration=tables.facts(report.calibration),
        evaluation=[tables.facts(item) for item in report.evaluation],
        artifact=tables.facts({"artifact": report.artifact.model_dump()}),
        provenance=tables.facts(rest),
        recipe=recipe,
    )
    return words.showable(page)


def _tiles(report: Report) -> list[tuple[str, str, str]]:
    """The numbers most readers came for: (label, value, comparison)."""
    before, after = report.measurements.source, report.measurements.compressed
    tiles: list[tuple[str, str, str]] = []
    if after.get("weight_bytes"):
        source = before.get("weight_bytes")
        share = f"{100 * after['weight_bytes'] / source:.0f} % of {words.size(source)}" if source else ""
        tiles.append(("Weights", words.size(after["weight_bytes"]), share))
    if "effective_bits" in after:
        tiles.append(("Bits per quantized weight", f"{after['effective_bits']:.2f}", "scales included"))
    divergences = [name for name in after if name.startswith("divergence.") and name.endswith(".mean_kl")]
    if divergences:
        name = max(divergences, key=lambda name: after[name])
        tiles.append(
            ("Mean KL to the source", words.number(after[name]), f"nats per token, {name.split('.', 1)[1][:-8]}")
        )
    ratios = {name: after[name] / before[name] for name in after if name.startswith("perplexity.") and before.get(name)}
    if ratios:
        name = max(ratios, key=lambda name: ratios[name])
        tiles.append(("Perplexity", f"× {ratios[name]:.3f}", f"of the source, {name.partition('.')[2]}"))
    return tiles


def _errors(stage: StageRecord) -> dict[str, Any]:
    return {
        "kind": stage.kind,
        "panels": pictures.block_error_panels(stage.modules),
        "rounding_known": any(module.rounding_error is not None for module in stage.modules),
        "worst": tables.worst_table(stage),
        "schemes": ", ".join(dict.fromkeys(module.scheme for module in stage.modules)),
    }


def _split(label: str, parts: dict[str, float]) -> dict[str, Any]:
    legend = [
        (f"part{index % pictures.PARTS}", name, words.duration(seconds))
        for index, (name, seconds) in enumerate(parts.items())
    ]
    return {
        "label": label,
        "total": words.duration(sum(parts.values())),
        "bar": pictures.time_bar(parts),
        "legend": legend,
    }
