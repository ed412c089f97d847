"""The manifest: what an artifact consists of, where it came from, and the digests that pin it down.

It is the last file written into a folder, so a folder without one is not an artifact. Three digests, each sha256:

*file*          over the bytes of one file.
*model_digest*  over one line per file below `model/`, README.md directly in it left out (its text carries version and
                time), sorted by path (code points): `<sha256 of file><two spaces><path below model/><newline>`.
                The same recipe run twice gives the same value. By hand, inside `model/`:

            find . -type f ! -path ./README.md -printf '%P\\0' | LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum

*digest*        over the manifest itself as UTF-8 JSON with sorted keys, no spaces, ASCII only and without the key
                `digest`. It covers the verdict, the lineage and, through `files`, every byte of the folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from compress.artifacts.paths import MANIFEST_NAME as MANIFEST_NAME
from compress.artifacts.paths import inside, refuse_files_as_folders
from compress.errors import CompressError
from compress.files import HASHED_AT_ONCE

Verdict = Literal["passed", "failed", "inconclusive"]
MODEL_FOLDER = "model"
_CHUNK_BYTES = 1 << 20


class ManifestError(CompressError):
    """A manifest is absent, is not JSON or breaks its schema; or a folder holds what no manifest may list."""


def _sorted(files: tuple[FileEntry, ...]) -> tuple[FileEntry, ...]:
    paths = [entry.path for entry in files]
    if paths != sorted(set(paths)):
        raise ValueError("the files are not sorted by path, or one is listed twice")
    refuse_files_as_folders(paths)
    return files


Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileEntry(_Value):
    """One file of the artifact: its path below the artifact folder with forward slashes, its bytes and its sha256."""

    path: Annotated[str, AfterValidator(inside)]
    bytes: int = Field(ge=0)
    sha256: Sha256


class Parent(_Value):
    """The artifact that a version was made from."""

    reference: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}@[vr][0-9]{4,9}$", description="NAME@v0003")
    digest: Sha256 = Field(description="of its manifest")


class Pin(_Value):
    """A place in a history: how many lines there are, and the sha256 of the last (zeros if there is none)."""

    seq: int = Field(ge=0)
    sha256: Sha256


class Manifest(_Value):
    """Everything `verify` needs to know about one version."""

    schema_: Literal[1] = Field(default=1, alias="schema")
    name: str
    version: str = Field(description="v0001 for a published version, r0001 for a rejected run")
    verdict: Verdict
    created: AwareDatetime = Field(description="UTC, ISO 8601")
    digest: Sha256 = Field(description="over this manifest without this field")
    model_digest: Sha256 = Field(description="over the files of model/ without README.md")
    lineage: dict[str, str] = Field(description="digests by role: source, recipe, calibration, parent")
    environment: dict[str, Any] = Field(description="versions, device, threads: JSON values only")
    files: Annotated[tuple[FileEntry, ...], AfterValidator(_sorted)] = Field(
        description="every file but the manifest, sorted by path"
    )
    parent: Parent | None = Field(default=None, description="what it was made from, if that was another artifact")
    history: Pin | None = Field(default=None, description="where the name's history ended when this was published")

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    @property
    def bytes(self) -> int:
        return sum(entry.bytes for entry in self.files)

    def fields(self) -> dict[str, Any]:
        """As JSON values. Absent optional fields are left out, so that older manifests keep their digest."""
        absent = {name for name in ("parent", "history") if getattr(self, name) is None}
        return self.model_dump(mode="json", by_alias=True, exclude=absent)

    def recomputed_digest(self) -> str:
        """The digest this manifest should carry, from its other fields."""
        fields = {name: value for name, value in self.fields().items() if name != "digest"}
        return hashlib.sha256(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def hash_file(path: Path) -> str:
    """sha256 of one file in hex, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as stream:
        while piece := stream.read(_CHUNK_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def list_files(folder: Path) -> tuple[list[str], list[str]]:
    """Return (paths of regular files, paths of everything else that is no folder), below `folder`, each sorted.

    Links are never followed: a link is "everything else", whether it points to a file or to a folder.
    """
    regular: list[str] = []
    strange: list[str] = []
    for parent, folders, names in os.walk(folder, onerror=_raise):
        linked_folders = [name for name in folders if (Path(parent) / name).is_symlink()]
        for name in names + linked_folders:
            path = Path(parent) / name
            kind = regular if stat.S_ISREG(path.lstat().st_mode) else strange
            kind.append(path.relative_to(folder).as_posix())
    return sorted(regular), sorted(strange)


@dataclass(frozen=True)
class Hashed:
    """A file as it was when it was hashed."""

    bytes: int
    modified: int
    """In nanoseconds, as the file system says."""
    sha256: str


def hash_files(folder: Path, known: Mapping[Path, Hashed] | None = None) -> tuple[FileEntry, ...]:
    """Entries for every file below `folder` but its manifest, sorted by path; several files are read at a time.

    `known` spares the reading of files that were hashed just before and whose size and time are still the same.
    Raises ManifestError when something is neither a file nor a folder: a link could point out of the artifact.
    """
    return tuple(
        FileEntry(path=path, bytes=file.bytes, sha256=file.sha256) for path, file in _all_hashed(folder, known or {})
    )


def _all_hashed(folder: Path, known: Mapping[Path, Hashed]) -> list[tuple[str, Hashed]]:
    regular, strange = list_files(folder)
    if strange:
        raise ManifestError(f"{folder / strange[0]}: only plain files and folders can be published; replace the link")
    paths = [path for path in regular if path != MANIFEST_NAME]
    with ThreadPoolExecutor(min(HASHED_AT_ONCE, os.cpu_count() or 1)) as threads:
        found = threads.map(lambda path: _hashed(folder / path, known), paths)
        return list(zip(paths, found, strict=True))


def _hashed(path: Path, known: Mapping[Path, Hashed]) -> Hashed:
    facts, before = path.stat(), known.get(path)
    if before is not None and (before.bytes, before.modified) == (facts.st_size, facts.st_mtime_ns):
        return before
    return Hashed(facts.st_size, facts.st_mtime_ns, hash_file(path))


def model_digest_of(files: Iterable[FileEntry]) -> str:
    """`model_digest` from the entries of a whole artifact (paths begin with `model/`). See the top of this file."""
    prefix = f"{MODEL_FOLDER}/"
    lines = sorted(
        (entry.path.removeprefix(prefix), entry.sha256)
        for entry in files
        if entry.path.startswith(prefix) and entry.path != f"{prefix}README.md"
    )
    return hashlib.sha256("".join(f"{sha256}  {path}\n" for path, sha256 in lines).encode()).hexdigest()


def model_digest(artifact: Path) -> str:
    """`model_digest` of the artifact in `artifact`, read from its `model/` folder; the report inside can name it."""
    return hashed_model(artifact)[0]


def hashed_model(artifact: Path) -> tuple[str, dict[Path, Hashed]]:
    """`model_digest`, and what was hashed for it: `known` to `hash_files` once the artifact is whole."""
    folder = artifact / MODEL_FOLDER
    found = _all_hashed(folder, {})
    entries = [FileEntry(path=f"{MODEL_FOLDER}/{path}", bytes=file.bytes, sha256=file.sha256) for path, file in found]
    return model_digest_of(entries), {folder / path: file for path, file in found}


def build(
    folder: Path,
    *,
    name: str,
    version: str,
    verdict: Verdict,
    lineage: Mapping[str, str],
    environment: Mapping[str, Any],
    parent: Mapping[str, str] | Parent | None = None,
    history: Pin | None = None,
    created: datetime | None = None,
    files: tuple[FileEntry, ...] | None = None,
) -> Manifest:
    """Hash every file below `folder` and return its manifest; nothing is written. `created` defaults to now.

    `parent` has `reference` and `digest`; the digest is repeated in the lineage. `files` spares the hashing where it
    was done just before. Raises ManifestError for links and special files, and TypeError or ValueError (mistakes of
    the caller) for facts that are no JSON, and for a parent whose digest is not that of the lineage.
    """
    files = hash_files(folder) if files is None else files
    made_from = None if parent is None else Parent.model_validate(parent)
    roles = dict(lineage)
    if made_from and roles.setdefault("parent", made_from.digest) != made_from.digest:
        raise ValueError(f"the lineage says {roles['parent']}, but {made_from.reference} is {made_from.digest}")
    draft = Manifest(
        name=name,
        version=version,
        verdict=verdict,
        created=(created or datetime.now(UTC)).astimezone(UTC).replace(microsecond=0),
        digest="0" * 64,
        model_digest=model_digest_of(files),
        lineage=roles,
        environment=json.loads(json.dumps(dict(environment), allow_nan=False)),
        files=files,
        parent=made_from,
        history=history,
    )
    return draft.model_copy(update={"digest": draft.recomputed_digest()})


def to_text(manifest: Manifest) -> str:
    """The JSON text of manifest.json."""
    return json.dumps(manifest.fields(), indent=2, ensure_ascii=False) + "\n"


def read(folder: Path | str) -> Manifest:
    """The manifest of the artifact in `folder`.

    Raises ManifestError naming the file when it is absent, unreadable, not JSON or not of this schema.
    """
    path = f"{folder}/{MANIFEST_NAME}"  # no Path: ten thousand of those take longer than the files
    try:
        with open(path, "rb", buffering=0) as stream:
            return Manifest.model_validate_json(stream.read())
    except FileNotFoundError:
        raise ManifestError(f"{path}: no such file, so {folder} is not an artifact") from None
    except OSError as error:
        raise ManifestError(f"{path}: cannot be read ({error.strerror})") from error
    except ValidationError as error:
        raise ManifestError(f"{path}: not a valid manifest. {_first_mistakes(error)}") from error


def _first_mistakes(error: ValidationError, most: int = 3) -> str:
    mistakes = [
        f"{'.'.join(str(part) for part in item['loc']) or 'file'}: {item['msg']}"
        for item in error.errors(include_url=False, include_input=False)
    ]
    more = f"; and {len(mistakes) - most} more" if len(mistakes) > most else ""
    return "; ".join(mistakes[:most]) + more


def _raise(error: OSError) -> None:
    raise error
