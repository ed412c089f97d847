"""The gates as JUnit XML, which every CI system draws: one test case per gate."""

from __future__ import annotations

from xml.etree import ElementTree

from compress.reports.report import GateResult, Report
from compress.reports.words import showable


def render_junit(report: Report) -> str:
    """junit.xml as text. An inconclusive gate is a failure of type "inconclusive": undecided must not look green. What
    cannot keep the verdict from passing (advisory gates, undecided supporting ones) is skipped, with its sentence."""
    missed = [gate for gate in report.gates if gate.verdict != "passed"]
    skipped = sum(_only_informs(gate) for gate in missed)
    suite = ElementTree.Element(
        "testsuite",
        name=showable(f"{report.artifact.name} {report.artifact.version}"),
        tests=str(len(report.gates)),
        failures=str(len(missed) - skipped),
        errors="0",
        skipped=str(skipped),
        time=f"{sum(report.seconds_by_step.values()):.3f}",
    )
    properties = ElementTree.SubElement(suite, "properties")
    for key, value in (("verdict", report.verdict), ("digest", report.artifact.digest)):
        ElementTree.SubElement(properties, "property", name=key, value=showable(value))
    for gate in report.gates:
        suite.append(_case(gate))
    root = ElementTree.Element("testsuites")
    root.append(suite)
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _case(gate: GateResult) -> ElementTree.Element:
    name = showable(f"{gate.measure} {gate.limit}")
    case = ElementTree.Element("testcase", classname=showable(f"compress.gates.{gate.kind}"), name=name, time="0")
    if gate.verdict != "passed" and _only_informs(gate):
        ElementTree.SubElement(case, "skipped", message=showable(f"{gate.tier}: {gate.sentence}"))
    elif gate.verdict != "passed":
        failure = ElementTree.SubElement(case, "failure", type=gate.verdict, message=showable(gate.sentence))
        failure.text = showable(f"observed {gate.observed}, interval {gate.interval}, limit {gate.limit}")
    return case


def _only_informs(gate: GateResult) -> bool:
    return gate.tier == "advisory" or (gate.tier == "supporting" and gate.verdict == "inconclusive")
