"""The attestation says what the manifest says, in the form that supply-chain tools read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from compress.artifacts import manifest
from compress.artifacts.attestation import ATTESTATION_PATH, LINEAGE_DIGEST
from compress.artifacts.store import Store
from compress.artifacts.verify import verify

from .conftest import FACTS, fill

Publish = Callable[..., Path]


def read(path: Path) -> dict[str, object]:
    return dict(json.loads((path / ATTESTATION_PATH).read_text()))


def test_its_subjects_are_the_files_of_the_manifest(publish: Publish) -> None:
    path = publish()
    found = read(path)
    listed = {entry.path: entry.sha256 for entry in manifest.read(path).files if entry.path != ATTESTATION_PATH}
    assert {subject["name"]: subject["digest"]["sha256"] for subject in found["subject"]} == listed  # type: ignore[attr-defined]
    assert (found["_type"], found["predicateType"]) == (
        "https://in-toto.io/Statement/v1",
        "https://slsa.dev/provenance/v1",
    )
    assert verify(path).ok


def test_it_names_what_the_version_was_built_from(store: Store, publish: Publish) -> None:
    parent = {"reference": "demo@v0001", "digest": manifest.read(publish()).digest}
    with store.staging("demo") as staged:
        fill(staged, seed=1)
        path = store.publish(staged, "demo", "passed", {**FACTS, "parent": parent})
    predicate = read(path)["predicate"]
    assert isinstance(predicate, dict)
    definition, details = predicate["buildDefinition"], predicate["runDetails"]
    made = manifest.read(path)
    assert {each["name"]: each["digest"][LINEAGE_DIGEST] for each in definition["resolvedDependencies"]} == {
        **FACTS["lineage"],
        "demo@v0001": parent["digest"],
    }
    recipe = next(entry.sha256 for entry in made.files if entry.path == "recipe.yaml")
    assert definition["externalParameters"]["recipe"]["digest"]["sha256"] == recipe
    assert definition["internalParameters"] == FACTS["environment"]
    assert details["metadata"]["invocationId"] == "demo@v0002"
    assert details["metadata"]["finishedOn"] == made.created.isoformat().replace("+00:00", "Z")


def test_one_that_was_copied_from_the_parent_is_replaced(store: Store, publish: Publish) -> None:
    parent = publish()
    with store.staging("demo") as staged:
        fill(staged)
        (staged / ATTESTATION_PATH).write_bytes((parent / ATTESTATION_PATH).read_bytes())
        path = store.publish(staged, "demo", "passed", FACTS)
    assert verify(path).ok
    assert ATTESTATION_PATH not in {subject["name"] for subject in read(path)["subject"]}  # type: ignore[attr-defined]
