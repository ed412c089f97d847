"""The HTML face: one file that needs nothing else, for a screen of any width, light or dark, and for paper.

The words and tables are those of `markdown.py`, the pictures those of `pictures.py`; the templates only place them.
Jinja escapes every value, and the page's own policy forbids scripts and anything from elsewhere, so a hostile name in a
recipe stays text.
"""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from compress.events import EVENT_KINDS
from compress.reports import (
    answers,
    gate_picture,
    maps,
    pictures,
    precision,
    previous_words,
    pruning,
    serving,
    tables,
    task_tables,
    words,
)
from compress.reports import standing as standings
from compress.reports.limits import limits
from compress.reports.report import Report, StageRecord
from compress.reports.standing import NOTHING, Standing

MARKS = {"passed": "✓", "failed": "✗", "inconclusive": "?", "damaged": "✗"}


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


def render_html(report: Report, standing: Standing = NOTHING) -> str:
    """The whole report as one HTML document. `standing`: channels and waivers as they are today."""
    page = (
        pages()
        .get_template("report.html.j2")
        .render(
            report=report,
            marks=MARKS,
            headline=words.headline(report),
            about=words.about(report),
            standing=standings.sentences(standing),
            waivers=standings.waivers_table(standing),
            tiles=_tiles(report),
            previous=_previous(report),
            strips=gate_picture.strips(report),
            gates=tables.gates_table(report),
            limits=limits(report, standing),
            event_counts=tables.event_counts_table(report),
            absent=[kind for kind in EVENT_KINDS if not report.event_counts.get(kind)],
            events=tables.events_table(report),
            round_trip=tables.round_trip_table(report),
            **_quality(report),
            **_making(report),
            **_memory(report),
            **_time(report),
            **_origin(report),
        )
    )
    return words.showable(page)


def _previous(report: Report) -> dict[str, Any] | None:
    record = report.previous
    if record is None:
        return None
    return {
        "title": previous_words.title(record),
        "sentences": previous_words.sentences(record),
        "tables": previous_words.tables(record),
    }


def _quality(report: Report) -> dict[str, Any]:
    """Measurements, tasks with what flipped, answers to prompts."""
    return {
        "quality": [*tables.quality_tables(report), *([tables.noise_table(report)] if report.noise else [])],
        "tasks": task_tables.tasks_table(report),
        "flips": task_tables.flips_tables(report),
        "answers": answers.shown(report.answers) if report.answers else [],
        "answers_said": answers.introduction(report.answers) if report.answers else "",
        "answers_same": answers.UNCHANGED,
    }


def _making(report: Report) -> dict[str, Any]:
    """What stages did to the model."""
    return {
        "pruned": pruning.shown(report),
        "plans": precision.shown(report),
        "error_map": maps.pieces(maps.error_cells(report), "bits and error of each linear"),
        "error_legend": maps.error_legend(report),
        "unmeasured": maps.unmeasured(report),
        "errors": [_errors(stage) for stage in report.stages if any(each.error is not None for each in stage.modules)],
        "stage_facts": [(stage.kind, tables.facts(precision.listed(stage))) for stage in report.stages if stage.facts],
    }


def _memory(report: Report) -> dict[str, Any]:
    return {
        "memory": tables.memory_table(report),
        "serving_said": serving.sentence(report.memory),
        "serving_note": serving.NOTE,
        "cache": serving.cache_table(report.memory),
        "serving": serving.plot(report.memory),
    }


def _time(report: Report) -> dict[str, Any]:
    return {
        "stages": tables.stages_table(report),
        "steps": _split("the whole run", report.seconds_by_step),
        "splits": [_split(stage.kind, stage.seconds_by_part) for stage in report.stages if stage.seconds_by_part],
    }


def _origin(report: Report) -> dict[str, Any]:
    """What went in, and where it was made."""
    rest, recipe = tables.split_recipe(report.provenance)
    return {
        "calibration": tables.facts(report.calibration),
        "evaluation": [tables.facts(item) for item in report.evaluation],
        "artifact": tables.facts({"artifact": report.artifact.model_dump()}),
        "provenance": tables.facts(rest),
        "recipe": recipe,
    }


def _tiles(report: Report) -> list[tuple[str, str, str]]:
    """The numbers most readers came for: (label, value, comparison)."""
    before, after = report.measurements.source, report.measurements.compressed
    tiles: list[tuple[str, str, str]] = []
    if after.get("weight_bytes"):
        source = before.get("weight_bytes")
        share = f"{100 * after['weight_bytes'] / source:.0f} % of {words.size(source)}" if source else ""
        tiles.append(("Weights", words.size(after["weight_bytes"]), share))
    if "effective_bits" in after:
        tiles.append(("Bits per weight of quantized linears", f"{after['effective_bits']:.2f}", "scales included"))
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
