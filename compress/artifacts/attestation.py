"""reports/attestation.json: what was built from what, in the form that supply-chain tools read.

An in-toto Statement v1 (https://in-toto.io/Statement/v1) whose subjects are the artifact's files and whose predicate is
SLSA provenance v1 (https://slsa.dev/provenance/v1). Nothing in it is new: it says what manifest and report say. It is
not signed, so it claims no more than the manifest that lists it; sign it for others with

    ssh-keygen -Y sign -f KEY -n compress-attestation < reports/attestation.json > demo-v0003.sig

Digests of the lineage are not those of single files, so they do not go under `sha256`: their key says whose they are.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from compress.artifacts.manifest import FileEntry, hash_file

ATTESTATION_PATH = "reports/attestation.json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "urn:compress-models:run:v1"
BUILDER = "urn:compress-models:compress"
LINEAGE_DIGEST = "compressLineageSha256"
RECIPE_PATH = "recipe.yaml"


def attach(
    folder: Path, files: Iterable[FileEntry], reference: str, facts: Mapping[str, Any], moment: datetime
) -> tuple[FileEntry, ...]:
    """Write the attestation of the staged artifact in `folder`. Returns all its files, the attestation among them.

    `files` are those that were hashed, `facts` what `Reservation.publish` was given, `moment` when it was made.
    """
    subjects = sorted((entry for entry in files if entry.path != ATTESTATION_PATH), key=lambda entry: entry.path)
    path = folder / ATTESTATION_PATH
    path.parent.mkdir(exist_ok=True)
    text = json.dumps(statement(subjects, reference, facts, moment), indent=1, sort_keys=True) + "\n"
    path.unlink(missing_ok=True)  # copied from another version, it is read-only
    path.write_text(text, encoding="utf-8")
    entry = FileEntry(path=ATTESTATION_PATH, bytes=path.stat().st_size, sha256=hash_file(path))
    return tuple(sorted((*subjects, entry), key=lambda each: each.path))


def statement(
    subjects: Iterable[FileEntry], reference: str, facts: Mapping[str, Any], moment: datetime
) -> dict[str, Any]:
    """The statement as JSON values."""
    listed = list(subjects)
    recipe = next((entry for entry in listed if entry.path == RECIPE_PATH), None)
    parent = facts.get("parent") or {}
    environment = json.loads(json.dumps(dict(facts.get("environment", {})), allow_nan=False))
    dependencies = [
        {"name": role, "digest": {LINEAGE_DIGEST: digest}}
        for role, digest in sorted(facts.get("lineage", {}).items())
        if role != "parent"
    ]
    if parent:
        dependencies.append({"name": parent["reference"], "digest": {LINEAGE_DIGEST: parent["digest"]}})
    return {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": entry.path, "digest": {"sha256": entry.sha256}} for entry in listed],
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": {
                    "recipe": {"name": RECIPE_PATH, "digest": {"sha256": recipe.sha256}} if recipe else None
                },
                "internalParameters": environment,
                "resolvedDependencies": dependencies,
            },
            "runDetails": {
                "builder": {"id": BUILDER, "version": {"compress": str(environment.get("compress", "unknown"))}},
                "metadata": {
                    "invocationId": reference,
                    "finishedOn": moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
                },
            },
        },
    }
