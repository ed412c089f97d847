"""Is this folder still the artifact that was published, and are its weights numbers?

Every file is hashed again and compared with the manifest; then every file of weights below `model/` is scanned tensor
by tensor (`verify_safetensors`, `verify_gguf`). All problems are collected: a reviewer wants the whole list, not the
first line.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.artifacts.manifest import (
    MANIFEST_NAME,
    MODEL_FOLDER,
    Manifest,
    ManifestError,
    hash_file,
    list_files,
    model_digest_of,
    read,
)
from compress.artifacts.verify_safetensors import BrokenSafetensors, non_finite_counts, read_header

INDEX_NAME = "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


@dataclass(frozen=True)
class VerifyResult:
    """What was looked at, and what is wrong: one sentence per problem, each beginning with the file it is about."""

    folder: Path
    problems: tuple[str, ...]
    files: int
    bytes: int
    tensors: int

    @property
    def ok(self) -> bool:
        return not self.problems


@dataclass(frozen=True)
class _Hashed:
    problems: list[str]
    files: int = 0
    bytes: int = 0


def verify(folder: Path, label: str | None = None) -> VerifyResult:
    """Check one artifact completely, in memory that does not grow with its size. Never raises for what it finds.

    `label` is the one it is checked for, where the folder is not called so yet.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return VerifyResult(folder, (f"{folder}: no such folder",), 0, 0, 0)
    try:
        regular, strange = list_files(folder)
    except OSError as error:
        return VerifyResult(folder, (f"{error.filename}: cannot be read ({error.strerror})",), 0, 0, 0)
    problems = [f"{path}: a link or special file; an artifact holds plain files only" for path in strange]
    problems += [
        f"{path}: a pickle can run code when loaded; only safetensors are allowed" for path in _pickles(regular)
    ]
    hashed = _check_manifest(folder, regular, set(strange), label)
    scanned, tensors = _check_model(folder / MODEL_FOLDER, regular)
    return VerifyResult(folder, (*problems, *hashed.problems, *scanned), hashed.files, hashed.bytes, tensors)


def check_sizes(folder: Path) -> VerifyResult:
    """The quick look: the manifest fits itself, and every file is there with its bytes. Nothing is hashed."""
    folder = Path(folder)
    try:
        regular, strange = list_files(folder)
        manifest = read(folder)
    except OSError as error:
        return VerifyResult(folder, (f"{error.filename}: cannot be read ({error.strerror})",), 0, 0, 0)
    except ManifestError as error:
        return VerifyResult(folder, (str(error),), 0, 0, 0)
    problems = [f"{path}: a link or special file; an artifact holds plain files only" for path in strange]
    problems += _check_listing(folder, manifest, set(regular) - {MANIFEST_NAME}, set(strange), hashing=False)
    problems += _check_digests(manifest, folder)
    return VerifyResult(folder, tuple(problems), len(manifest.files), manifest.bytes, 0)


def _pickles(paths: list[str]) -> list[str]:
    return [path for path in paths if path.lower().endswith(_PICKLES)]


def _check_manifest(folder: Path, regular: list[str], strange: set[str], label: str | None) -> _Hashed:
    if MANIFEST_NAME in strange:
        return _Hashed([])
    try:
        manifest = read(folder)
    except ManifestError as error:
        return _Hashed([str(error)])
    present = set(regular) - {MANIFEST_NAME}
    listed = {entry.path for entry in manifest.files}
    problems = _check_listing(folder, manifest, present, strange, hashing=True)
    problems += _check_digests(manifest, folder, label)
    return _Hashed(problems, len(listed & present), manifest.bytes)


def _check_listing(folder: Path, manifest: Manifest, present: set[str], strange: set[str], hashing: bool) -> list[str]:
    problems: list[str] = []
    for entry in manifest.files:
        if entry.path in present:
            problems += _check_bytes(folder / entry.path, entry.path, entry.bytes, entry.sha256 if hashing else None)
        elif entry.path not in strange:
            problems.append(f"{entry.path}: in the manifest, but missing")
    listed = {entry.path for entry in manifest.files}
    return problems + [f"{path}: not in the manifest" for path in sorted(present - listed)]


def _check_bytes(path: Path, name: str, size: int, sha256: str | None) -> list[str]:
    """`sha256` None: the size alone is compared."""
    try:
        found = path.stat().st_size
        if found != size:
            return [f"{name}: {found:,} bytes, but {size:,} were published"]
        return (
            []
            if sha256 is None or hash_file(path) == sha256
            else [f"{name}: its bytes have changed since it was published"]
        )
    except OSError as error:
        return [f"{name}: cannot be read ({error.strerror})"]


def _check_digests(manifest: Manifest, folder: Path, label: str | None = None) -> list[str]:
    problems: list[str] = []
    if manifest.recomputed_digest() != manifest.digest:
        problems.append(f"{MANIFEST_NAME}: has been edited: its digest does not fit its contents")
    if model_digest_of(manifest.files) != manifest.model_digest:
        problems.append(f"{MANIFEST_NAME}: the model digest does not fit the files of {MODEL_FOLDER}/")
    name = folder.resolve().name
    if label is None and name[:1] in "vr" and name[1:].isdigit():
        label = name
    return problems + (label_problems(manifest, label) if label else [])


def label_problems(manifest: Manifest, label: str) -> list[str]:
    """How a manifest does not fit the label that it lies under."""
    problems: list[str] = []
    if label != manifest.version:
        problems.append(f"{MANIFEST_NAME}: says {manifest.version}, but the folder is {label}")
    if (manifest.verdict == "passed") != label.startswith("v"):
        problems.append(f"{MANIFEST_NAME}: the verdict {manifest.verdict} does not belong under {label}")
    return problems


def _check_model(model: Path, regular: list[str]) -> tuple[list[str], int]:
    """Problems of the weights, with paths below the artifact; and the number of tensors seen."""
    prefix = f"{MODEL_FOLDER}/"
    names = [path for path in regular if path.startswith(prefix) and path.endswith(".safetensors")]
    others = [path for path in regular if path.startswith(prefix) and path.endswith(".gguf")]
    if others and not names:
        from compress.artifacts.verify_gguf import scan

        scans = [scan(model.parent / name, name) for name in others]
        return [problem for _, found in scans for problem in found], sum(count for count, _ in scans)
    if not names:
        return [f"{prefix}: holds no safetensors file and no .gguf file"], 0
    problems: list[str] = []
    tensors: dict[str, set[str]] = {}
    for name in names:
        found, mistakes = _scan(model.parent / name, name)
        problems += mistakes
        tensors[name.removeprefix(prefix)] = found
    if f"{prefix}{INDEX_NAME}" in regular:
        problems += _check_index(model / INDEX_NAME, tensors)
    elif len(names) > 1:
        problems.append(f"{prefix}: {len(names)} safetensors files, but no {INDEX_NAME} that says what is in which")
    return problems, sum(len(found) for found in tensors.values())


def _scan(path: Path, name: str) -> tuple[set[str], list[str]]:
    try:
        header = read_header(path)
        bad = non_finite_counts(path, header)
    except BrokenSafetensors as error:
        return set(), [f"{name}: {error}"]
    except OSError as error:
        return set(), [f"{name}: cannot be read ({error.strerror})"]
    problems = [f"{name}: {tensor}: {count:,} values are NaN or infinite" for tensor, count in bad.items()]
    return {tensor.name for tensor in header}, problems


def _check_index(path: Path, tensors: dict[str, set[str]]) -> list[str]:
    """Compare the index with what the shards hold; `tensors` are names by shard, relative to the index."""
    label = f"{MODEL_FOLDER}/{INDEX_NAME}"
    weight_map = _weight_map(path)
    if weight_map is None:
        return [f"{label}: not JSON with a weight_map of tensor names to files"]
    problems = [
        f"{label}: names {shard}, which is missing" for shard in sorted(set(weight_map.values()) - set(tensors))
    ]
    for tensor, shard in sorted(weight_map.items()):
        if shard in tensors and tensor not in tensors[shard]:
            problems.append(f"{label}: {tensor} should be in {shard}, but is missing there")
    for shard, found in sorted(tensors.items()):
        problems += [
            f"{MODEL_FOLDER}/{shard}: {tensor} is extra: the index does not place it there"
            for tensor in sorted(found)
            if weight_map.get(tensor) != shard
        ]
    return problems


def _weight_map(path: Path) -> dict[str, str] | None:
    try:
        content: Any = json.loads(path.read_bytes())
        weight_map = content["weight_map"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        return None
    return weight_map
