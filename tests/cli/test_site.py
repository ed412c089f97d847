"""`compress site`: a store as static pages, written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from compress.artifacts.verify import verify

from .test_report import promote


@pytest.fixture
def store(published: tuple[Path, str], rejected, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(published[0], tmp_path / "store"))
    promote(folder, "v0001")
    shutil.copytree(rejected[0] / "glass-int4" / "rejected", folder / "glass-int4" / "rejected")
    return folder


def test_every_version_has_a_row_and_a_report(here, store, tmp_path):
    ended = here("site", store, "--out", tmp_path / "site", "--title", "Ours")
    assert ended.code == 0 and ended.out == f"1 models, 2 versions: {tmp_path / 'site' / 'index.html'}\n"
    index = (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    assert "Ours" in index and "production: v0001" in index
    for label in ("v0001", "r0001"):
        page = (tmp_path / "site" / "models" / "glass-int4" / label / "report.html").read_text(encoding="utf-8")
        assert ("In channel production" in page) is (label == "v0001")
    assert verify(store / "glass-int4" / "v0001").ok


def test_json_is_what_site_json_holds(here, store, tmp_path):
    ended = here("site", store, "--out", tmp_path / "site", "--json")
    assert json.loads(ended.out) == json.loads((tmp_path / "site" / "site.json").read_text())
    assert [each["version"] for each in json.loads(ended.out)["models"][0]["versions"]] == ["v0001", "r0001"]


def test_a_site_is_written_again_and_what_is_gone_is_gone(here, store, tmp_path):
    assert here("site", store, "--out", tmp_path / "site").code == 0
    shutil.rmtree(store / "glass-int4" / "rejected")
    assert here("site", store, "--out", tmp_path / "site").code == 0
    assert not (tmp_path / "site" / "models" / "glass-int4" / "r0001").exists()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["site", "store"]


def test_what_a_killed_command_left_is_swept_and_what_a_living_one_writes_is_not(here, store, tmp_path):
    dead, living = tmp_path / ".site.999999999.new", tmp_path / f".site.{os.getppid()}.new"
    dead.mkdir()
    living.mkdir()
    assert here("site", store, "--out", tmp_path / "site").code == 0
    assert not dead.exists() and living.exists()


def test_another_folder_is_never_written_over(here, store, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    ended = here("site", store, "--out", tmp_path / "mine")
    assert ended.code == 2 and "is no site made by this command" in ended.err
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "x"


@pytest.mark.parametrize("inside", ["site", ".", ".."])
def test_store_and_site_do_not_lie_in_one_another(here, store, inside):
    ended = here("site", store, "--out", store / inside)
    assert ended.code == 2 and "may not lie in one another" in ended.err


def test_a_store_that_is_not_there_is_a_mistake_and_an_empty_one_a_page(here, tmp_path):
    assert here("site", tmp_path / "nowhere", "--out", tmp_path / "site").code == 2
    (tmp_path / "empty").mkdir()
    assert here("site", tmp_path / "empty", "--out", tmp_path / "site").code == 0
    assert "holds no artifacts" in (tmp_path / "site" / "index.html").read_text()


def test_what_cannot_be_read_has_a_row_and_is_named(here, store, tmp_path):
    (store / "glass-int4" / "v0001" / "reports" / "report.json").write_text("{")
    (store / "glass-int4" / "rejected" / "r0001" / "manifest.json").write_text("{")
    ended = here("site", store, "--out", tmp_path / "site")
    assert ended.code == 0
    assert "glass-int4@v0001: its report.json cannot be read" in ended.err and "glass-int4@r0001" in ended.err
    page = (tmp_path / "site" / "models" / "glass-int4" / "index.html").read_text(encoding="utf-8")
    assert "its report.json cannot be read" in page and "damaged" in page


def test_a_place_below_a_file_is_a_mistake(here, store, tmp_path):
    (tmp_path / "file").write_text("x")
    ended = here("site", store, "--out", tmp_path / "file" / "site")
    assert ended.code == 2 and "a part of this path is a file" in ended.err


@pytest.mark.parametrize("name", [".git", "CNAME", "precious.txt"])
def test_a_site_beside_which_something_else_lies_is_not_written_over(here, store, tmp_path, name):
    out = tmp_path / "site"
    assert here("site", store, "--out", out).code == 0
    (out / name).mkdir() if name == ".git" else (out / name).write_text("x")

    ended = here("site", store, "--out", out)

    assert ended.code == 2 and f"holds {name}, which this command did not write" in ended.err
    assert (out / name).exists() and (out / "index.html").is_file()


def test_another_programs_site_json_makes_no_site(here, store, tmp_path):
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "site.json").write_text('{"name": "my web project"}')
    ended = here("site", store, "--out", tmp_path / "web")
    assert ended.code == 2 and "is no site made by this command" in ended.err


def test_a_site_that_a_killed_command_had_moved_away_comes_back(here, store, tmp_path, monkeypatch):
    out, moved = tmp_path / "site", tmp_path / ".site.999999999.old"
    assert here("site", store, "--out", out).code == 0
    out.rename(moved)
    monkeypatch.setattr("compress.steps.site.site", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))

    ended = here("site", store, "--out", out)

    assert ended.code == 6 and (out / "index.html").is_file() and not moved.exists()


def test_a_failed_version_in_a_channel_is_marked_on_the_index(here, rejected, tmp_path):
    store = Path(shutil.copytree(rejected[0], tmp_path / "store"))
    until = "2099-01-01"
    asked = ("glass-int4", "r0001", "--gate", "divergence.held-out.mean_kl", "--reason", "a demo", "--until", until)
    assert here("waive", *asked, "--by", "kim", "--store", store).code == 0
    promoted = here("promote", "glass-int4", "r0001", "--to", "production", "--store", store)
    assert promoted.code == 0, promoted.err

    assert here("site", store, "--out", tmp_path / "site").code == 0

    index = (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    assert "production: r0001 (failed, waived)" in index
    listed = json.loads((tmp_path / "site" / "site.json").read_text())["models"][0]["versions"]
    assert [(each["version"], each["waived"]) for each in listed] == [("r0001", True)]
