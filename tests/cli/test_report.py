"""`compress report`: drawn again from report.json, with the channels of today; the artifact stays as it is."""

from __future__ import annotations

import json
import shutil
from datetime import UTC, datetime
from pathlib import Path

import pytest

from compress.artifacts import desk
from compress.artifacts.store import Store
from compress.artifacts.verify import verify
from compress.reports.report import Report


def promote(store: Path, version: str, channel: str = "production") -> None:
    """Put a version into a channel, in January by kim."""
    january = datetime(2026, 1, 5, 10, tzinfo=UTC)
    desk.promote(Store(store), "glass-int4", version, channel, by="kim", now=january)


@pytest.fixture
def store(published: tuple[Path, str], tmp_path: Path) -> Path:
    return Path(shutil.copytree(published[0], tmp_path / "store"))


def test_markdown_goes_to_stdout_with_the_channels_of_today(here, store):
    promote(store, "v0001")
    ended = here("report", "glass-int4", "--store", store)
    assert ended.code == 0
    assert ended.out.startswith("# Passed: glass-int4 v0001")
    assert "In channel production since 2026-01-05T10:00:00+00:00, by kim." in ended.out
    assert "In channel" not in (store / "glass-int4" / "v0001" / "reports" / "report.md").read_text()


def test_without_a_channel_it_is_the_report_that_was_published(here, store):
    published_md = (store / "glass-int4" / "v0001" / "reports" / "report.md").read_text(encoding="utf-8")
    assert here("report", "glass-int4", "--store", store).out == published_md


@pytest.mark.parametrize(("name", "begins"), [("r.html", "<!DOCTYPE html>"), ("r.md", "# Passed"), ("r.json", "{")])
def test_the_ending_of_out_tells_the_format_and_the_path_is_printed(here, store, tmp_path, name, begins):
    out = tmp_path / "new" / name
    ended = here("report", "glass-int4@v0001", "--store", store, "--out", out)
    assert (ended.code, ended.out) == (0, f"{out}\n")
    assert out.read_text(encoding="utf-8").lstrip().startswith(begins)


@pytest.mark.parametrize("asked", [("--json",), ("--format", "json")])
def test_json_is_the_report_with_its_standing(here, store, asked):
    promote(store, "v0001")
    ended = here("report", "glass-int4", "--store", store, *asked)
    document = json.loads(ended.out)
    standing = document.pop("standing")
    assert standing.pop("served") is None
    assert standing == {
        "channels": [{"channel": "production", "since": "2026-01-05T10:00:00+00:00", "by": "kim"}],
        "waivers": [],
    }
    assert Report.model_validate(document).verdict == "passed"


def test_with_json_and_out_stdout_has_the_document_and_nothing_else(here, store, tmp_path):
    ended = here("report", "glass-int4", "--store", store, "--json", "--out", tmp_path / "r.html")
    assert json.loads(ended.out)["verdict"] == "passed"
    assert (tmp_path / "r.html").read_text(encoding="utf-8").lstrip().startswith("<!DOCTYPE html>")


def test_a_channel_of_another_version_is_not_shown(here, store):
    from tests.artifacts.conftest import overwrite

    promote(store, "v0001")
    path = store / "glass-int4" / "channels" / "production.json"
    overwrite(path, path.read_text().replace("v0001", "v0002").encode())
    assert "In channel" not in here("report", "glass-int4", "--store", store).out


def test_an_artifact_named_by_its_folder_has_the_channels_of_its_own_store_and_a_copy_has_none(here, store, tmp_path):
    promote(store, "v0001")
    folder = store / "glass-int4" / "v0001"
    assert "In channel production" in here("report", folder, "--store", tmp_path / "other").out
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert "In channel" not in here("report", copy, "--store", store).out


def test_the_artifact_is_still_whole_and_nothing_is_written_into_the_store(here, store):
    inside = store / "glass-int4" / "v0001" / "again.html"
    ended = here("report", "glass-int4", "--store", store, "--out", inside)
    assert ended.code == 2 and "artifacts never change" in ended.err
    assert here("report", "glass-int4", "--store", store, "--out", store / "again.html").code == 2
    assert not inside.exists() and verify(store / "glass-int4" / "v0001").ok


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--format", "htm"), 'Did you mean "html"?'),
        (("--out", "report.pdf"), "its ending is none of"),
        (("--out", "."), "this is a folder"),
        (("--out", "README.md/report.md"), "a part of this path is a file"),
    ],
)
def test_mistakes_are_named_and_end_with_2(here, store, arguments, says):
    ended = here("report", "glass-int4", "--store", store, *arguments)
    assert (ended.code, ended.out) == (2, "") and says in ended.err


def test_a_name_that_is_not_there_is_answered_with_the_nearest(here, store):
    ended = here("report", "glass-int8", "--store", store)
    assert ended.code == 2 and 'Did you mean "glass-int4"?' in ended.err


@pytest.mark.parametrize(
    ("content", "says"), [(None, "cannot be read"), ('{"schema": 1}', "not a report"), ("{", "not a report")]
)
def test_a_report_that_cannot_be_read_says_what_to_do(here, store, content, says):
    path = store / "glass-int4" / "v0001" / "reports" / "report.json"
    path.unlink() if content is None else path.write_text(content)
    ended = here("report", "glass-int4", "--store", store)
    assert ended.code == 1 and says in ended.err and "compress verify" in ended.err and "Traceback" not in ended.err


def test_a_channel_that_cannot_be_read_is_an_error_and_not_no_channel(here, store):
    promote(store, "v0001")
    path = store / "glass-int4" / "channels" / "production.json"
    path.unlink()
    path.write_text("{}")
    ended = here("report", "glass-int4", "--store", store)
    assert ended.code == 1 and "production.json: not a channel file" in ended.err


def test_a_report_of_before_the_new_keys_is_drawn_too(here, store):
    path = store / "glass-int4" / "v0001" / "reports" / "report.json"
    old = json.loads(path.read_text(encoding="utf-8"))
    for key in ("previous", "limits"):
        old.pop(key)
    for key in ("serving", "max_context"):
        old["memory"].pop(key)
    path.write_text(json.dumps(old), encoding="utf-8")
    ended = here("report", "glass-int4", "--store", store, "--format", "html")
    assert ended.code == 0 and "Not tested (" in ended.out and "When served" not in ended.out
