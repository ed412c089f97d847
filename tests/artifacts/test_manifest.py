"""The manifest's digests, and what a broken manifest is answered with."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from compress.artifacts import manifest
from compress.artifacts.manifest import ManifestError
from compress.artifacts.store import Store

from .conftest import FACTS, fill, overwrite

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
        "reports/attestation.json",
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
    overwrite(path / "manifest.json", json.dumps(content).encode())
    with pytest.raises(ManifestError, match="not a plain path"):
        manifest.read(path)


def test_a_copied_artifact_is_the_same_artifact(publish: Publish, tmp_path: Path) -> None:
    path = publish()
    shutil.copytree(path, tmp_path / "copy")
    assert manifest.read(tmp_path / "copy") == manifest.read(path)


# --- lineage --------------------------------------------------------------------------------------------------------


def test_a_version_made_from_another_names_it(store: Store, publish: Publish) -> None:
    source = manifest.read(publish())
    parent = {"reference": "demo@v0001", "digest": source.digest}
    with store.staging("demo") as staged:
        fill(staged, seed=3)
        path = store.publish(staged, "demo", "passed", {**FACTS, "parent": parent})
    made = manifest.read(path)
    assert made.parent is not None and made.parent.model_dump() == parent
    assert made.lineage == {**FACTS["lineage"], "parent": source.digest}
    assert made.recomputed_digest() == made.digest
    line = store.history("demo").lines[-1]
    assert (line.detail, line.parent) == ("made from demo@v0001", made.parent)


@pytest.mark.parametrize(
    "facts",
    [
        {"parent": {"reference": "demo@v0001", "digest": "short"}},
        {"parent": {"reference": "../demo@v0001", "digest": "a" * 64}},
        {"parent": {"reference": "demo@v0001", "digest": "a" * 64}, "lineage": {"parent": "b" * 64}},
    ],
)
def test_a_parent_that_is_none_is_a_mistake_of_the_caller(store: Store, facts: dict[str, object]) -> None:
    with store.staging("demo") as staged:
        fill(staged)
        with pytest.raises(ValueError, match=r"parent|lineage|digest|reference"):
            store.publish(staged, "demo", "passed", facts)
    assert store.versions("demo") == []


def test_a_manifest_written_before_there_were_parents_keeps_its_digest(publish: Publish) -> None:
    path = publish() / "manifest.json"
    older = {key: value for key, value in json.loads(path.read_text()).items() if key not in ("history", "digest")}
    text = json.dumps(older, sort_keys=True, separators=(",", ":"))
    older["digest"] = hashlib.sha256(text.encode()).hexdigest()
    path.unlink()
    path.write_text(json.dumps(older))
    read = manifest.read(path.parent)
    assert (read.parent, read.history) == (None, None)
    assert read.recomputed_digest() == read.digest
    assert "history" not in manifest.to_text(read)


def test_a_manifest_remembers_where_the_history_ended(store: Store, publish: Publish) -> None:
    first, second = manifest.read(publish()), manifest.read(publish())
    assert first.history is not None and first.history.seq == 0
    assert second.history is not None
    assert (second.history.seq, second.history.sha256) == (1, store.history("demo").ends[0])


def test_what_was_hashed_before_is_not_read_again_unless_it_changed(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    for name in ("a", "b"):
        (tmp_path / "model" / name).write_text(name)
    digest, known = manifest.hashed_model(tmp_path)
    assert digest == manifest.model_digest(tmp_path)
    expected = manifest.hash_files(tmp_path)
    # As long as before: only the time tells.
    (tmp_path / "model" / "b").write_text("c")
    later = known[tmp_path / "model" / "b"].modified + 10**9
    os.utime(tmp_path / "model" / "b", ns=(later, later))
    read = []
    original = manifest.hash_file
    monkeypatch.setattr(manifest, "hash_file", lambda path: read.append(path.name) or original(path))

    found = manifest.hash_files(tmp_path, known)

    assert read == ["b"]
    assert found[0] == expected[0] and found[1].sha256 == original(tmp_path / "model" / "b") != expected[1].sha256
