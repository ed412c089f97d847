"""All faces of one report, written beside each other."""

from __future__ import annotations

import json
from pathlib import Path

from compress.reports.html import render_html
from compress.reports.junit import render_junit
from compress.reports.markdown import render_markdown
from compress.reports.records import records
from compress.reports.report import Report


def write_report(report: Report, folder: Path) -> None:
    """Write report.json, report.md, report.html, junit.xml, events.jsonl and records.jsonl into `folder`.

    The folder is made if missing. report.json is the report itself; the others are drawn from it. The same report gives
    the same bytes. Raises OSError as the file system does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = report.model_dump_json(by_alias=True, indent=2) + "\n"
    faces = {
        "report.json": text,
        "report.md": render_markdown(report),
        "report.html": render_html(report),
        "junit.xml": render_junit(report),
        # From the serialised report, where numbers that JSON does not know (NaN) are strings already.
        "events.jsonl": "".join(json.dumps(event) + "\n" for event in json.loads(text)["events"]),
        "records.jsonl": "".join(json.dumps(record) + "\n" for record in records(report)),
    }
    for name, content in faces.items():
        (folder / name).write_text(content, encoding="utf-8", newline="\n")
