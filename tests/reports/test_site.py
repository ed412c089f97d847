"""The index site: links lead somewhere, hostile text stays text, what cannot be read has a row all the same."""

from __future__ import annotations

import posixpath
import re
from itertools import pairwise
from typing import Any
from xml.etree import ElementTree

from compress.reports.plots import Point, scatter
from compress.reports.report import Measurements, Report
from compress.reports.site import Entry, Shelf, common_measure, listing, site
from compress.reports.standing import ChannelMark, Standing, Waiver

from .example import HOSTILE, example_report, hostile_report, measurements
from .test_faces import Page


def entry(label: str, report: Report | None = None, **changes: Any) -> Entry:
    fields: dict[str, Any] = {
        "label": label,
        "verdict": report.verdict if report else "passed",
        "created": "2026-01-05T10:00:00+00:00",
        "bytes": 123_456,
        "digest": "ab" * 32,
        "report": report,
    }
    return Entry(**(fields | changes))


def shelves() -> list[Shelf]:
    production = Standing((ChannelMark("production", "2026-01-06", "kim"),))
    return [
        Shelf(
            "smollm2-w4",
            (entry("v0002", example_report(), standing=production), entry("r0001", example_report("failed"))),
        ),
        Shelf("other", (entry("v0001", None, verdict="damaged", problem="its report.json cannot be read"),)),
    ]


def test_every_link_leads_to_a_page_of_the_site() -> None:
    pages = site(shelves(), "Our models")
    assert len(pages) == 1 + 2 + 2
    for path, text in pages.items():
        for name, value in Page(text).attributes:
            if name == "href" and not (value or "").startswith("#"):
                assert posixpath.normpath(posixpath.join(posixpath.dirname(path), value or "")) in pages, (path, value)


def test_the_index_has_verdicts_channels_sizes_and_counts() -> None:
    text = Page(site(shelves(), "Our models")["index.html"]).text
    for wanted in (
        "Our models",
        "smollm2-w4",
        "passed",
        "98.0 MiB (38 % of source)",
        "production : v0002",
        "1 passed, 1 not",
    ):
        assert wanted in text.replace("production:", "production :"), wanted
    assert "damaged" in text


def test_the_page_of_a_model_has_each_version_and_says_what_is_wrong_with_one() -> None:
    pages = site(shelves(), "x")
    text = Page(pages["models/smollm2-w4/index.html"]).text
    assert "met all 4 gates" in text and "failed 1 of 4 gates" in text and "0.0614" in text
    assert "its report.json cannot be read" in Page(pages["models/other/index.html"]).text


def test_a_copied_report_shows_channels_and_waivers_of_today() -> None:
    waived = Standing((), (Waiver("kim", "a demo needs it", "2026-02-01", ("perplexity.x",), "SHA256:abc"),))
    pages = site([Shelf("m", (entry("r0001", example_report("failed"), standing=waived),))], "x")
    text = Page(pages["models/m/r0001/report.html"]).text
    for wanted in ("Waived, not passed: perplexity.x.", "a demo needs it", "SHA256:abc", "2026-02-01"):
        assert wanted in text
    assert "Waived." in Page(pages["models/m/index.html"]).text


def test_hostile_text_stays_text_on_every_page() -> None:
    standing = Standing((ChannelMark(HOSTILE, HOSTILE, HOSTILE),), (Waiver(*[HOSTILE] * 3, (HOSTILE,), HOSTILE),))
    hostile = entry("v0001", hostile_report(), created=HOSTILE, digest=HOSTILE, standing=standing)
    pages = site([Shelf("m", (hostile, entry("v0002", None, verdict=HOSTILE, problem=HOSTILE)))], HOSTILE)
    for path, text in pages.items():
        page = Page(text)
        assert not {"script", "iframe", "img", "link", "object"} & set(page.tags), path
        assert not [name for name, _ in page.attributes if name.startswith("on") or name == "src"], path
        hrefs = [value or "" for name, value in page.attributes if name == "href"]
        assert all(
            re.fullmatch(
                r"#[a-z]+|(\.\./)*(models/m/)?((v0001/)?report|index)\.html|models/m/v0001/report\.html", value
            )
            for value in hrefs
        )
        assert "\x1b" not in text and "\x01" not in text
        assert 'alert("x")' in page.text, path


def test_the_listing_for_programs_names_every_version() -> None:
    (first, second) = listing(shelves())
    assert [each["version"] for each in first["versions"]] == ["v0002", "r0001"]
    assert first["versions"][0]["channels"] == ["production"]
    assert first["versions"][0]["report"] == "models/smollm2-w4/v0002/report.html"
    assert second["versions"][0]["report"] is None


def test_quality_is_what_most_versions_share() -> None:
    base = measurements()
    other = Measurements(source={}, compressed={"weight_bytes": 1.0, "perplexity.x": 3.0})
    assert common_measure(Shelf("m", (entry("v0001", example_report(measurements=base)),))).endswith("docs.mean_kl")
    assert common_measure(Shelf("m", (entry("v0001", example_report(measurements=other)),))) == "perplexity.x"
    assert common_measure(Shelf("m", (entry("v0001"),))) == ""


def test_versions_without_the_number_or_on_another_text_are_left_out_and_named() -> None:
    texts = [{"set": "python-docs", "digest": digest} for digest in ("a", "b")]
    rows = [entry(f"v000{at + 1}", example_report(evaluation=[text])) for at, text in enumerate(texts)]
    page = site([Shelf("m", (*rows, entry("v0003")))], "x")["models/m/index.html"]
    assert "measured against another source or on another text: v0002, v0003." in Page(page).text
    assert page.count('<circle class="mark') == 1


def places(picture: str) -> list[tuple[float, float]]:
    found = ElementTree.fromstring(picture).findall("circle")
    return [(float(circle.get("cx", "")), float(circle.get("cy", ""))) for circle in found]


def test_larger_is_further_right_and_worse_is_higher() -> None:
    (ax, ay), (bx, by) = places(scatter([Point(100, 0.01, "a", "passed"), Point(200, 0.5, "b", "failed")], "", ""))
    assert ax < bx and ay > by


def test_one_point_and_points_that_are_not_finite() -> None:
    assert len(places(scatter([Point(1, 0.0, "a", "passed"), Point(2, float("nan"), "b", "passed")], "", ""))) == 1
    assert scatter([], "", "") == "" and scatter([Point(1, float("inf"), "a", "passed")], "", "") == ""


def measured_against(source: str, text: str) -> Report:
    """The example's report, measured against another source or on another text."""
    report = example_report()
    sets = [{"set": "python-docs", "digest": text}]
    provenance = {**report.provenance, "source": {**report.provenance["source"], "digest": source}}
    return report.model_copy(update={"evaluation": sets, "provenance": provenance})


def test_versions_of_another_source_or_text_than_most_stand_in_no_plot() -> None:
    reports = [("a", "t"), ("a", "t"), ("b", "t"), ("a", "u")]
    entries = [entry(f"v000{at + 1}", measured_against(*pair)) for at, pair in enumerate(reports)]

    text = Page(site([Shelf("m", tuple(entries))], "x")["models/m/index.html"]).text

    assert "measured against another source or on another text: v0003, v0004." in text


def test_waivers_that_do_not_count_are_listed_and_wave_nothing() -> None:
    over = Waiver("kim", "why", "2020-01-01", ("perplexity.x",), "", counts=False, over=True)
    forged = Waiver("eve", "why", "2099-01-01", ("perplexity.x",), "ssh SHA256:x", counts=False)
    pages = site([Shelf("m", (entry("r0001", example_report("failed"), standing=Standing((), (over, forged))),))], "x")

    text = Page(pages["models/m/r0001/report.html"]).text
    assert "2020-01-01 (over)" in text and "2099-01-01 (does not count)" in text
    assert "Waived, not passed" not in text and "Waived." not in Page(pages["models/m/index.html"]).text


def test_labels_of_points_that_lie_together_do_not_lie_on_one_another() -> None:
    from compress.reports.plots import _LINE, _label_places

    places = _label_places([(100.0, 100.0, 30.0), (101.0, 100.0, 30.0), (102.0, 101.0, 30.0), (400.0, 100.0, 30.0)])

    heights = sorted(height for _, height, _ in places[:3])
    assert all(high - low >= _LINE for low, high in pairwise(heights))
    assert places[3][1] == 94.0
