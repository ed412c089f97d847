"""The manifest's digests, and what a broken manifest is answered with."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from compress.artifacts import manifest
from compress.artifacts.manifest import ManifestError

from .conftest import FACTS, fill

Publish = Callable[..., Path]


def test_the_model_digest_is_what_sha256sum_says(publish: Publish) -> None:
    path = publish(prepare=lambda folder: (folder / "model" / "Zebra é.txt").write_text("sorted by code point"))
    command = "find . -type f ! -path ./README.md -printf '%P\\0' | LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum"
    by_hand = subprocess.run(command, shell=True, cwd=path / "model", capture_output=True, text=True, check=True)
    assert manifest.read(path).model_digest == by_hand.stdout.split()[0] == manifest.model_digest(path)


def test_the_same_model_has_the_same_model_digest_whatever_its_card_and_version_say(publish: Publish) -> None:
    first = manifest.read(publish())
    second = manifest.read(publish(prepare=lambda folder: (folder / "model" / "README.md").write_text("another")))
    assert first.model_digest == second.model_digest
    assert first.digest != second.digest


def test_a_changed_weight_changes_the_model_digest(tmp_path: Path) -> None:
    fill(tmp_path / "a", seed=1)
    fill(tmp_path / "b", seed=2)
    assert manifest.model_digest(tmp_path / "a") != manifest.model_digest(tmp_path / "b")


def test_a_manifest_lists_every_other_file_sorted_and_reads_back_equal(publish: Publish) -> None:
    path = publish()
    read = manifest.read(path)
    assert [entry.path for entry in read.files] == [
        "model/README.md",
        "model/config.json",
        "model/model.safetensors",
        "recipe.yaml",
        "reports/report.json",
    ]
    assert read.lineage == FACTS["lineage"]
    assert read.environment == FACTS["environment"]
    assert manifest.to_text(read) == (path / "manifest.json").read_text()
    assert read.recomputed_digest() == read.digest


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not a valid manifest"),
        ("[]", "not a valid manifest"),
        ("", "not a valid manifest"),
        ("{}", "schema|name"),
        (None, "no such file"),
    ],
)
def test_a_broken_manifest_is_named(publish: Publish, text: str | None, says: str) -> None:
    path = publish() / "manifest.json"
    path.unlink()
    if text is not None:
        path.write_text(text)
    with pytest.raises(ManifestError, match=says) as raised:
        manifest.read(path.parent)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("bad", ["../outside", "/etc/passwd", "a/../b", ".", "a//b", ""])
def test_a_manifest_cannot_list_a_path_outside_its_folder(publish: Publish, bad: str) -> None:
    path = publish()
    content = json.loads((path / "manifest.json").read_text())
    content["files"] = [{**content["files"][0], "path": bad}]
    (path / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(ManifestError, match="not a plain path"):
        manifest.read(path)


def test_a_copied_artifact_is_the_same_artifact(publish: Publish, tmp_path: Path) -> None:
    path = publish()
    shutil.copytree(path, tmp_path / "copy")
    assert manifest.read(tmp_path / "copy") == manifest.read(path)
