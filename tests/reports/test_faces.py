"""What the Markdown, HTML and JUnit faces say, and that hostile text stays text in all of them."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from markdown_it import MarkdownIt

from compress.events import EVENT_KINDS
from compress.reports import tables, words
from compress.reports.html import render_html
from compress.reports.junit import render_junit
from compress.reports.limits import limits
from compress.reports.markdown import render_markdown
from compress.reports.report import PredictedMeasured, Report, Verdict
from compress.reports.task_tables import flips_tables, tasks_table
from compress.reports.words import headline
from compress.reports.write import write_report

from .example import HOSTILE, RECIPE, example_report, hostile_report, memory, task


class Page(HTMLParser):
    """Collects tags, attributes and text, as a browser would see them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []
        self.feed(html)
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_every_face_is_written_and_the_json_reads_back_equal(tmp_path: Path) -> None:
    report = example_report()
    write_report(report, tmp_path / "reports")
    names = sorted(path.name for path in (tmp_path / "reports").iterdir())
    assert names == ["events.jsonl", "junit.xml", "records.jsonl", "report.html", "report.json", "report.md"]
    text = (tmp_path / "reports" / "report.json").read_text()
    assert Report.model_validate_json(text) == report
    assert json.loads(text)["schema"] == 1
    lines = (tmp_path / "reports" / "events.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [event.to_json() for event in report.events]


def test_writing_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        write_report(example_report(), tmp_path / folder)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


@pytest.mark.parametrize(
    ("verdict", "says"),
    [
        ("passed", "smollm2-w4 v0003 met all 4 gates, with 98.0 MiB of weights in place of 256.6 MiB."),
        ("failed", "smollm2-w4 v0003 failed 1 of 4 gates: perplexity.python-docs."),
        (
            "inconclusive",
            "smollm2-w4 v0003 failed no critical gate, but 1 of 4 gates could not be decided: perplexity.python-docs.",
        ),
    ],
)
def test_the_verdict_comes_first_in_one_sentence(verdict: Verdict, says: str) -> None:
    report = example_report(verdict)
    assert headline(report) == says
    assert render_markdown(report).splitlines()[0] == f"# {verdict.capitalize()}: {says}"
    body = render_html(report).split("<body>")[1]
    assert body.index(says) < body.index("<h2>")


def test_a_report_without_gates_says_so() -> None:
    assert "judged by no gate at all" in headline(example_report("failed", gates=[]))


def test_a_report_of_a_run_that_measured_nothing_can_be_drawn(tmp_path: Path) -> None:
    empty = example_report(
        "failed",
        gates=[],
        measurements={"source": {}, "compressed": {}},
        stages=[],
        round_trip=None,
        events=[],
        event_counts={},
        evaluation=[],
        calibration={},
        provenance={},
        seconds_by_step={},
    )
    write_report(empty, tmp_path)
    assert "Quality was not measured on any text." in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("face", ["html", "markdown"])
def test_every_section_is_there_with_its_numbers(face: str) -> None:
    report = example_report()
    text = Page(render_html(report)).text if face == "html" else render_markdown(report).replace("&lt;", "<")
    for wanted in (
        "1.039 to 1.055",  # interval of a gate
        "<= 1.08 x source",  # its limit
        "19.29",  # perplexity after
        "2.3e-07",  # noise floor
        "0.0583 to 0.0647",  # interval of the mean KL
        "KL divergence, 99.9th percentile",
        "89.2 %",  # top-1 agreement
        "98.0 MiB",
        "4.25",
        "KV cache: 2,048 tokens, 4 at once",
        "+4.8 %",  # error of the predicted peak
        "1.20 GiB",
        "forward 1 min 01 s (47 %)",
        "damping_raised",
        "asked 0.01; used 0.1",
        "AutoModelForCausalLM",
        "disjoint windows of 512 tokens",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "compress run recipes/quickstart.yaml",
        "No task benchmarks",
    ):
        assert wanted in text, wanted
    assert " ".join(RECIPE.split()) in " ".join(text.split())


def test_a_measurement_that_was_not_made_is_never_shown_as_zero() -> None:
    cell = PredictedMeasured(predicted=None, measured=None)
    report = example_report(memory=memory().model_copy(update={"peak_host": cell}))
    row = next(row for row in tables.memory_table(report).rows if row[0].startswith("Peak host"))
    assert row[1:4] == (words.MISSING,) * 3


def test_set_names_may_hold_dots() -> None:
    titles = [table.title for table in tables.quality_tables(example_report())]
    assert titles == ["Whole model", "python-docs", "rfc.text-2024"]


def test_kinds_of_events_that_did_not_happen_are_listed_too() -> None:
    text = Page(render_html(example_report())).text
    assert all(kind in text for kind in EVENT_KINDS)


def test_a_long_list_of_events_is_cut_with_a_word_about_the_rest() -> None:
    report = example_report()
    many = example_report(events=[*report.events] * 40)
    for text in (Page(render_html(many)).text, render_markdown(many)):
        assert "The first 200 of 280" in text


def test_limits_name_what_was_not_tested() -> None:
    said = " ".join(limits(example_report("failed", round_trip=None)))
    for wanted in ("verdict is failed", "python-docs", "not reloaded", "quantized file", "Speed"):
        assert wanted in said


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (words.size(1536 * 1024), "1.50 MiB"),
        (words.size(3 << 30), "3.00 GiB"),
        (words.size(4096), "4.0 KiB"),
        (words.size(0), "0.00 MiB"),
        (words.size(None), words.MISSING),
        (words.number(0.000123456), "0.0001235"),
        (words.number(1_234_567.0), "1,234,567"),
        (words.number(float("nan")), "nan"),
        (words.duration(0.25), "0.25 s"),
        (words.duration(59.94), "59.9 s"),
        (words.duration(61), "1 min 01 s"),
        (words.duration(3725), "1 h 02 min"),
    ],
)
def test_numbers_read_as_people_write_them(text: str, wanted: str) -> None:
    assert text == wanted


# --- hostile text -----------------------------------------------------------------------------------------------------


def test_hostile_text_stays_text_in_html() -> None:
    html = render_html(hostile_report())
    page = Page(html)
    assert not {"script", "iframe", "img", "link", "object"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on") or name == "src"]
    assert all(re.fullmatch("#[a-z]+", value or "") for name, value in page.attributes if name == "href")
    assert '<script>alert("x")</script>' in page.text
    assert "{{ 7*7 }}" in page.text
    assert "\x01" not in html and "\x1b" not in html
    assert set(Page(render_html(example_report())).tags) >= set(page.tags)


def test_hostile_text_stays_text_in_markdown() -> None:
    text = render_markdown(hostile_report())
    html = MarkdownIt("commonmark").enable("table").render(text)
    page = Page(html)
    assert not {"script", "a", "img"} & set(page.tags)
    # A pipe or a line break that got through would make a row longer than its table.
    for table in re.findall(r"<table>.*?</table>", html, re.DOTALL):
        cells = {len(re.findall(r"<t[hd]", row)) for row in re.findall(r"<tr>.*?</tr>", table, re.DOTALL)}
        assert len(cells) == 1
    assert page.tags.count("pre") == 1
    assert HOSTILE.replace("\x01", "\ufffd").replace("\x1b", "\ufffd") in "".join(page.texts)


def test_the_page_loads_nothing_and_runs_nothing() -> None:
    html = render_html(example_report())
    page = Page(html)
    assert not {"script", "link", "img", "iframe", "object", "embed"} & set(page.tags)
    assert not re.search(r"url\(|@import|https?://", html)
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'") in (
        page.attributes
    )


# --- JUnit ------------------------------------------------------------------------------------------------------------


def test_junit_has_one_case_per_gate_and_undecided_is_a_failure() -> None:
    suite = ElementTree.fromstring(render_junit(example_report("inconclusive"))).find("testsuite")
    assert suite is not None
    assert (suite.get("tests"), suite.get("failures")) == ("4", "1")
    assert len(suite.findall("testcase")) == 4
    failure = suite.find("testcase/failure")
    assert failure is not None and failure.get("type") == "inconclusive"
    assert failure.get("message") == "Perplexity on python-docs is 1.047 times the source's."


def test_junit_is_valid_xml_with_hostile_text() -> None:
    root = ElementTree.fromstring(render_junit(hostile_report()).encode())
    failure = root.find("testsuite/testcase/failure")
    assert failure is not None and failure.get("type") == "failed"
    assert '<script>alert("x")</script>' in (failure.get("message") or "")
    assert "\ufffd" in (failure.get("message") or "")


def test_tasks_are_one_table_and_flips_are_shown_by_direction() -> None:
    report = example_report(tasks=[task(nll_source=2.5, nll_compressed=2.75, few_shot=2)])
    (row,) = tasks_table(report).rows
    assert row[:4] == ("capitals", "75.6 %", "63.1 %", "-12.4 points")
    assert row[5:] == (
        *("217", "30 lost, 3 gained", "7e-07"),
        *("2.5 → 2.75", "multiple choice, 2 examples, no chat template"),
    )
    (flips,) = flips_tables(report)
    assert flips.title == "capitals: 1 of 30 answers lost by compression"
    for face in (render_markdown(report), Page(render_html(report)).text):
        assert "The capital of Gabon is" in face and "Libreville / Monrovia" in face
        assert "Monrovia (-11.41 nats)" in face


def test_a_report_without_tasks_has_no_section_for_them() -> None:
    assert "<h2>Tasks" not in render_html(example_report()) and "## Tasks" not in render_markdown(example_report())


def test_measurements_of_tasks_are_in_their_own_table_only() -> None:
    measured = example_report().measurements
    more = {"task.capitals.accuracy": 0.5}
    both = measured.model_copy(update={"source": measured.source | more, "compressed": measured.compressed | more})
    with_tasks = example_report(measurements=both, tasks=[task()])
    assert "capitals" not in [table.title for table in tables.quality_tables(with_tasks)]
    assert "capitals" in [table.title for table in tables.quality_tables(example_report(measurements=both))]


def _with_tier(report: Report, tier: str) -> Report:
    gates = [gate.model_copy(update={"tier": tier}) for gate in report.gates[1:]]
    return report.model_copy(update={"gates": [report.gates[0], *gates]})


def test_what_only_informs_is_skipped_in_junit_and_left_out_of_the_headline() -> None:
    report = _with_tier(example_report("failed"), "advisory").model_copy(update={"verdict": "passed"})
    missed = sum(gate.verdict != "passed" for gate in report.gates[1:])
    suite = ElementTree.fromstring(render_junit(report)).find("testsuite")
    assert missed and suite is not None
    assert (suite.get("failures"), suite.get("skipped")) == ("0", str(missed))
    assert "its only gate" in headline(report)


def test_a_supporting_gate_that_failed_is_named_in_the_headline() -> None:
    report = _with_tier(example_report("failed"), "supporting").model_copy(update={"verdict": "inconclusive"})
    failed = [gate.measure for gate in report.gates if gate.verdict == "failed"]
    assert failed and all(measure in headline(report) for measure in failed)


@pytest.mark.parametrize(
    ("kind", "measure", "observed", "shown"),
    [
        ("non_inferiority", "perplexity.s", 0.0189, "1.89 %"),
        ("non_inferiority", "task.capitals.accuracy", 0.025, "2.5 points"),
        ("non_inferiority", "divergence.s.mean_kl", 0.05, "0.05"),
        ("memory", "memory.serving", 3.0 * 2**30, "3.00 GiB"),
        ("size", "weight_bytes", 0.25, "0.25"),
    ],
)
def test_a_gate_shows_what_it_observed_in_the_unit_of_its_limit(kind, measure, observed, shown) -> None:
    report = example_report("passed")
    gate = report.gates[0].model_copy(update={"kind": kind, "measure": measure, "observed": observed, "interval": None})
    (row,) = tables.gates_table(report.model_copy(update={"gates": [gate]})).rows
    assert row[3].startswith(shown[:4]) and row[3].split()[-1] == shown.split()[-1]
