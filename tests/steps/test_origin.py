"""What a source says of itself is carried over; nothing is guessed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from compress.checkpoints.sources import Source
from compress.steps.origin import described

CARD = """\
---
license: other
license_name: own-1.0
license_link: https://example.org/own
language: [en, de]
---
# Model
"""


def source(folder: Path, readme: str | None = None, config: dict[str, Any] | None = None, **facts: Any) -> Source:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config or {}))
    if readme is not None:
        (folder / "README.md").write_text(readme)
    return Source(folder, {"kind": "folder", **facts})


def test_the_front_matter_of_the_readme_is_carried_over(tmp_path):
    assert described(source(tmp_path / "m", CARD)) == {
        "licence": "other",
        "licence_name": "own-1.0",
        "licence_link": "https://example.org/own",
        "language": ["en", "de"],
        "described_by": "README.md of the source",
    }


def test_one_language_is_a_list_of_one(tmp_path):
    assert described(source(tmp_path / "m", "---\nlanguage: fr\n---\n"))["language"] == ["fr"]


def test_a_converted_source_is_described_where_it_was_named(tmp_path):
    source(tmp_path / "named", CARD)
    assert described(source(tmp_path / "cache", path=str(tmp_path / "named")))["licence"] == "other"


def test_the_config_is_asked_where_no_readme_says_it(tmp_path):
    found = described(source(tmp_path / "m", "# prose only\n", {"license": "mit"}))
    assert found == {"licence": "mit", "described_by": "config.json of the source"}


@pytest.mark.parametrize(
    "readme", [None, "", "# prose\n", "---\nlicense: [\n---\n", "---\n- a\n---\n", "---\nlicense: 3\n---\n"]
)
def test_nothing_is_invented(tmp_path, readme):
    assert "licence" not in described(source(tmp_path / "m", readme))


def test_a_gguf_says_it_in_its_metadata(tmp_path):
    from gguf import GGUFWriter

    path = tmp_path / "m.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_license("apache-2.0")
    writer.add_languages(["en"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    found = described(source(tmp_path / "cache", path=str(path)))
    assert (found["licence"], found["language"]) == ("apache-2.0", ["en"])
    assert found["described_by"] == "metadata of the .gguf of the source"


def test_a_hub_source_is_asked_for_its_readme_and_may_be_out_of_reach(tmp_path, monkeypatch):
    asked = []

    def download(repo: str, name: str, revision: str | None) -> str:
        asked.append((repo, name, revision))
        if revision == "gone":
            raise OSError("offline")
        (tmp_path / "README.md").write_text(CARD)
        return str(tmp_path / "README.md")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    found = described(source(tmp_path / "m", id="owner/name", revision="abc"))
    assert found["licence"] == "other" and asked == [("owner/name", "README.md", "abc")]
    assert described(source(tmp_path / "m", id="owner/name", revision="gone")) == {}
