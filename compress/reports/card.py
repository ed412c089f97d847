"""The model card: README.md beside the weights, with the metadata that hub pages read.

Metadata: https://huggingface.co/docs/hub/model-cards, the measurements in its `model-index` form.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from compress.reports import markdown, previous, pruning, tables, task_tables, words
from compress.reports.limits import limits
from compress.reports.report import Report, StageRecord

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
_LICENCE_ID = re.compile(r"[A-Za-z0-9.+-]{1,40}")
_LANGUAGE = re.compile(r"[A-Za-z]{2,3}(-[A-Za-z0-9]{2,8})*", re.ASCII)
_PLAIN = re.compile(r"[\w./:+#-]{1,200}", re.ASCII)


class _Ready(str):
    """Markdown that is finished: tables and fences, made from escaped text."""


def model_card(report: Report) -> str:
    """README.md as text: YAML front matter, then use, making, measurements, gates and limits.

    From `report.provenance["source"]` it reads `base_model` or `id` (a hub id "owner/name" becomes metadata), `name`,
    `licence` or `license` with `licence_name` and `licence_link`, and `language`; all may be missing.
    """
    source = report.provenance.get("source")
    source = source if isinstance(source, Mapping) else {}
    metadata = yaml.safe_dump(_metadata(report, source), sort_keys=False, allow_unicode=True, width=120)
    return f"---\n{metadata}---\n\n{_body(report, source)}"


def _metadata(report: Report, source: Mapping[str, Any]) -> dict[str, Any]:
    base = _base_model(source)
    # What the hub's page says to load it with; transformers would take a GGUF file for float16 weights.
    library = "gguf" if _format(report) == "gguf" else "transformers"
    data: dict[str, Any] = {"library_name": library, "pipeline_tag": "text-generation"}
    if base:
        data["base_model"] = base
        data |= {"base_model_relation": relation} if (relation := _relation(report)) else {}
    data |= _licence_data(source)
    languages = source.get("language")
    if isinstance(languages, list) and all(isinstance(each, str) and _LANGUAGE.fullmatch(each) for each in languages):
        data["language"] = languages
    data["tags"] = _tags(report)
    results = list(_results(report))
    if results:
        data["model-index"] = [{"name": report.artifact.name, "results": results}]
    return data


def _relation(report: Report) -> str:
    """One of the hub's adapter, finetune, merge and quantized. It has none for pruned models: they are finetunes."""
    if _quantized(report):
        return "quantized"
    return "finetune" if report.stages else ""


def _licence_data(source: Mapping[str, Any]) -> dict[str, str]:
    """As the source has it: an identifier, and for `other` its name and address."""
    licence = _licence(source)
    if not _LICENCE_ID.fullmatch(licence):
        return {}
    more = {f"license_{key}": source.get(f"licence_{key}") for key in ("name", "link")}
    kept = {key: value for key, value in more.items() if isinstance(value, str) and _PLAIN.fullmatch(value)}
    return {"license": licence.lower(), **kept}


def _quantized(report: Report) -> bool:
    return any(module.effective_bits < 16 for stage in report.stages for module in stage.modules)


def _tags(report: Report) -> list[str]:
    """What people look for on the hub: methods, number formats, bits, the format of the files."""
    last = previous.schemes_of(report).values()
    schemes = [scheme.split()[0] for scheme in last if scheme.split()]
    bits = [f"{digits}-bit" for scheme in schemes if (digits := scheme.lstrip("abcdefghijklmnopqrstuvwxyz")).isdigit()]
    named = _format(report)
    return list(
        dict.fromkeys(
            [
                "compress",
                *(["pruned"] if pruning.pruners(report) else []),
                *(["quantized", *([named] if named else [])] if _quantized(report) else []),
                *(stage.kind for stage in report.stages),
                *schemes,
                *bits,
            ]
        )
    )


def _format(report: Report) -> str:
    export = previous.resolved_recipe(report).get("export")
    named = export.get("format") if isinstance(export, Mapping) else None
    return named if isinstance(named, str) else ""


def _results(report: Report) -> Iterator[dict[str, Any]]:
    """One result per evaluation set. Hub pages refuse numbers that are not finite, so those stay in the table only."""
    for name, measures in tables.measures_by_set(report.measurements.compressed).items():
        metrics = [
            {"type": what, "value": value, "name": tables.label(what)}
            for what, value in measures.items()
            if math.isfinite(value)
        ]
        if name and metrics:
            dataset = {"name": name, "type": re.sub(r"[^\w./-]+", "-", name, flags=re.ASCII)}
            yield {"task": {"type": "text-generation"}, "dataset": dataset, "metrics": metrics}


def _quality(report: Report) -> list[tables.Table]:
    return [*tables.quality_tables(report), *([task_tables.tasks_table(report)] if report.tasks else [])]


def _base_model(source: Mapping[str, Any]) -> str:
    for key in ("base_model", "id"):
        value = source.get(key)
        if isinstance(value, str) and _HUB_ID.fullmatch(value):
            return value
    return ""


def _source_name(source: Mapping[str, Any]) -> str:
    """Nobody's paths: a card is uploaded."""
    name = words.source_name(source)
    return "the source model" if name == words.MISSING else name


def _licence(source: Mapping[str, Any]) -> str:
    value = source.get("licence") or source.get("license")
    return value if isinstance(value, str) else ""


def _did(stage: StageRecord, is_last: bool) -> str:
    """What a stage did, in half a line."""
    facts = stage.facts
    if "block_parameters" in facts:
        return pruning.sentence(facts)
    if "held_out_kl_after" in facts:
        before, after = words.number(facts["held_out_kl_before"]), words.number(facts["held_out_kl_after"])
        what = facts.get("train", "scales+norms")
        text = "calibration windows kept out of training"
        if facts.get("held_out_from") == "self_generated":
            text = "text of the source's own that nothing was fitted to"
        return f"{what} trained; mean KL on {text} {before} before and {after} after"
    if "share_of_zeros" in facts:
        kept = "" if is_last else "; stages after it do not keep them zero"
        return f"{words.percent(facts['share_of_zeros'])} of the weights set to zero, {facts['pattern']}{kept}"
    if "places" in facts:
        scaled = sum(place["alpha"] is not None for place in facts["places"])
        return f"channel factors folded in at {scaled} of {len(facts['places'])} places; the same function"
    if stage.kind == "kv_cache":
        return f"scales calibrated for a KV cache in {facts['dtype']}, one a {facts['per']}; no weights changed"
    return ", ".join(dict.fromkeys(module.scheme for module in stage.modules)) or "no weights changed"


def _body(report: Report, source: Mapping[str, Any]) -> str:
    environment = Environment(
        loader=PackageLoader("compress.reports", "templates"),
        autoescape=False,  # Markdown, not HTML: `finalize` escapes what comes from outside
        finalize=lambda value: value if isinstance(value, _Ready) else markdown.escape(value),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    stages = [
        {"kind": stage.kind, "did": _did(stage, is_last=at == len(report.stages))}
        for at, stage in enumerate(report.stages, start=1)
    ]
    quality = [{"title": table.title, "text": _Ready(markdown.table_text(table))} for table in _quality(report)]
    calibration = markdown.table_text(tables.Table("", ("Calibration", ""), "ll", tables.facts(report.calibration)))
    return environment.get_template("card.md.j2").render(
        report={"artifact": report.artifact, "stages": stages},
        headline=words.headline(report),
        gguf=_format(report) == "gguf",
        token_ids_only=any(event.kind == "tokenizer_left_out" for event in report.events),
        base=_Ready(_base_model(source)),
        source_name=_source_name(source),
        loader=report.round_trip.loader if report.round_trip and report.round_trip.passed else "",
        calibration=_Ready(calibration),
        tables=quality,
        gates=_Ready(markdown.table_text(tables.gates_table(report))),
        limits=limits(report),
        licence=_licence(source),
    )
