"""Which release a version is compared with."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from compress.artifacts.channels import Channel
from compress.artifacts.store import Store
from compress.reports.write import write_report
from compress.steps.previous import against_previous, previous_release
from tests.reports.example import example_report

NAME = "smollm2-w4"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """v0001 and v0002 published, r0001 rejected, each with the example's report."""
    for label in ("v0001", "v0002", "rejected/r0001"):
        folder = tmp_path / NAME / label
        artifact = example_report().artifact.model_copy(update={"version": folder.name, "path": str(folder)})
        write_report(example_report(artifact=artifact), folder / "reports")
        (folder / "manifest.json").write_text("{}")
    return Store(tmp_path)


def promote(store: Store, text: str, channel: str = "production") -> None:
    folder = store.root / NAME / "channels"
    folder.mkdir(exist_ok=True)
    (folder / f"{channel}.json").write_text(text)


def leading_to(label: str, channel: str = "production") -> str:
    """The content of a channel's file."""
    place = f"{NAME}/{label}"
    since, pin = datetime(2026, 11, 1, tzinfo=UTC), {"seq": 1, "sha256": "0" * 64}
    held = Channel(
        name=NAME, channel=channel, version=label, path=place, digest="0" * 64, since=since, by="kim", history=pin
    )
    return held.text()


@pytest.mark.parametrize(
    ("label", "wanted"),
    [("v0003", "v0002"), ("v10000", "v0002"), ("v0002", "v0001"), ("v0001", None), ("r0002", "v0002")],
)
def test_without_a_channel_it_is_the_newest_version_before_that_passed(store, label, wanted):
    version, chosen = previous_release(store, NAME, label)
    assert (version.label if version else None) == wanted
    assert chosen == ("the newest version that had passed" if wanted else "")


def test_what_production_leads_to_comes_first_unless_it_is_the_version_itself(store):
    promote(store, leading_to("v0001"))
    promote(store, leading_to("v0002", "staging"), "staging")
    version, chosen = previous_release(store, NAME, "v0003")
    assert version is not None and (version.label, chosen) == ("v0001", "which production leads to")
    assert previous_release(store, NAME, "v0001")[0] is None


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 3}', leading_to("v0009")])
def test_a_channel_that_leads_nowhere_ends_no_run_and_is_said(store, text):
    promote(store, text)
    report = against_previous(example_report(), store)
    assert report.previous is not None and report.previous.problem


def test_the_report_carries_the_comparison(store):
    report = against_previous(example_report("failed"), store)
    assert report.previous is not None and report.previous.version == "v0002"
    assert against_previous(example_report(), Store(store.root / "elsewhere")).previous is None


@pytest.mark.parametrize("content", [None, "{", "{}"])
def test_a_release_whose_report_cannot_be_read_ends_no_run(store, content):
    path = store.root / NAME / "v0002" / "reports" / "report.json"
    path.unlink() if content is None else path.write_text(content)
    report = against_previous(example_report(), store)
    assert report.previous is not None and "its report.json cannot be read" in report.previous.problem
