"""The index site: every model of a store, its versions, verdicts, channels and sizes, with a page for each report.

    index.html                            one row a model
    models/<name>/index.html              its versions, and quality against bytes
    models/<name>/<version>/report.html   the report, drawn today

Pages are plain files: no scripts, no server, nothing from elsewhere. Names of models are those the store allows, so
that they are safe in paths; everything else is escaped.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from compress.reports import words
from compress.reports.html import MARKS, pages, render_html
from compress.reports.plots import Point, scatter
from compress.reports.report import Report
from compress.reports.standing import NOTHING, Standing
from compress.reports.tables import label_of


@dataclass(frozen=True)
class Entry:
    """One version. `report` is None where it cannot be read; `problem` says why. `bytes`: of all its files."""

    label: str
    verdict: str
    created: str
    bytes: int | None
    digest: str
    standing: Standing = NOTHING
    report: Report | None = None
    problem: str = ""


@dataclass(frozen=True)
class Shelf:
    """All versions of one name, the newest first, rejected runs last."""

    name: str
    entries: tuple[Entry, ...]


def site(shelves: list[Shelf], title: str) -> dict[str, str]:
    """{path below the site: text} of every page."""
    found = {"index.html": _index(shelves, title)}
    for shelf in shelves:
        found[f"models/{shelf.name}/index.html"] = _model(shelf)
        for entry in shelf.entries:
            if entry.report is not None:
                found[f"models/{shelf.name}/{entry.label}/report.html"] = render_html(entry.report, entry.standing)
    return found


def listing(shelves: list[Shelf]) -> list[dict[str, Any]]:
    """The same for programs: what site.json holds."""
    return [
        {
            "name": shelf.name,
            "versions": [
                {
                    "version": entry.label,
                    "verdict": entry.verdict,
                    "created": entry.created,
                    "bytes": entry.bytes,
                    "model_digest": entry.digest,
                    "channels": [mark.channel for mark in entry.standing.channels],
                    "waived": entry.standing.waived,
                    "report": f"models/{shelf.name}/{entry.label}/report.html" if entry.report else None,
                    "problem": entry.problem,
                }
                for entry in shelf.entries
            ],
        }
        for shelf in shelves
    ]


def _index(shelves: list[Shelf], title: str) -> str:
    rows = [_row_of_shelf(shelf) for shelf in shelves]
    return words.showable(pages().get_template("site.html.j2").render(title=title, rows=rows, marks=MARKS))


def _row_of_shelf(shelf: Shelf) -> dict[str, Any]:
    newest = shelf.entries[0]
    passed = sum(entry.verdict == "passed" for entry in shelf.entries)
    return {
        "name": shelf.name,
        "newest": newest,
        "weights": weights(newest),
        "source": _source(newest),
        "channels": [
            {
                "channel": mark.channel,
                "label": entry.label,
                "verdict": entry.verdict,
                "waived": entry.standing.waived,
            }
            for entry in shelf.entries
            for mark in entry.standing.channels
        ],
        "counts": f"{passed} passed, {len(shelf.entries) - passed} not",
    }


def weights(entry: Entry) -> str:
    """Tensor bytes, and their share of the source's."""
    if entry.report is None:
        return words.MISSING
    before, after = (getattr(entry.report.measurements, side).get("weight_bytes") for side in ("source", "compressed"))
    share = f" ({100 * after / before:.0f} % of source)" if before and after else ""
    return f"{words.size(after)}{share}"


def _source(entry: Entry) -> str:
    source = entry.report.provenance.get("source") if entry.report else None
    return words.source_name(source) if isinstance(source, dict) else words.MISSING


def _model(shelf: Shelf) -> str:
    measure = common_measure(shelf)
    picture, left_out = _picture(shelf, measure)
    rows = [
        {
            "entry": entry,
            "sentence": words.headline(entry.report) if entry.report else entry.problem,
            "weights": weights(entry),
            "quality": _quality(entry, measure),
        }
        for entry in shelf.entries
    ]
    page = (
        pages()
        .get_template("site_model.html.j2")
        .render(
            name=shelf.name,
            rows=rows,
            marks=MARKS,
            measure=label_of(measure) if measure else "",
            picture=picture,
            left_out=left_out,
        )
    )
    return words.showable(page)


def common_measure(shelf: Shelf) -> str:
    """The mean KL that most versions have, else the perplexity that most have; empty if none has any."""
    for prefix, suffix in (("divergence.", ".mean_kl"), ("perplexity.", "")):
        counts = Counter(
            name
            for entry in shelf.entries
            if entry.report is not None
            for name in entry.report.measurements.compressed
            if name.startswith(prefix) and name.endswith(suffix)
        )
        if counts:
            return counts.most_common(1)[0][0]
    return ""


def _quality(entry: Entry, measure: str) -> str:
    value = entry.report.measurements.compressed.get(measure) if entry.report and measure else None
    return words.measured(measure, value)


def _picture(shelf: Shelf, measure: str) -> tuple[Markup, str]:
    """Quality over bytes, and which versions have no place in it because they lack a number, or were measured against
    another source or on another text than most."""
    points, left_out = [], []
    counts = Counter(_measured_on(entry, measure) for entry in shelf.entries if entry.report is not None)
    most = counts.most_common(1)[0][0] if counts else None
    for entry in shelf.entries:
        after = entry.report.measurements.compressed if entry.report else {}
        size, value = after.get("weight_bytes"), after.get(measure)
        if size is None or value is None or _measured_on(entry, measure) != most:
            left_out.append(entry.label)
            continue
        marks = [mark.channel for mark in entry.standing.channels]
        interval = entry.report.measurements.intervals.get(measure) if entry.report else None
        points.append(Point(size, value, ", ".join([entry.label, *marks]), entry.verdict, interval))
    return scatter(points, "tensor bytes", label_of(measure) if measure else ""), ", ".join(left_out)


def _measured_on(entry: Entry, measure: str) -> tuple[str, str]:
    """Digests of the source, and of the text behind `divergence.<set>.mean_kl` or `perplexity.<set>`; '' if untold."""
    name = measure.partition(".")[2].removesuffix(".mean_kl")
    sets = entry.report.evaluation if entry.report else []
    source = entry.report.provenance.get("source") if entry.report else None
    text = next((item.get("digest") for item in sets if item.get("set") == name), None)
    return str(source.get("digest") or "" if isinstance(source, dict) else ""), str(text or "")
