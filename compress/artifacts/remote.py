"""Where versions are pushed to and pulled from: any URL that fsspec knows, laid out as a store is.

    <URL>/<name>/v0003/manifest.json, model/, ...        <URL>/<name>/rejected/r0001/...

The manifest is written last, so a version without one is not there yet; a manifest that is a beginning of ours was torn
by a crash and is ours to finish. Nothing that was there before with other bytes is ever replaced once a manifest says
that it is whole.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from compress.artifacts import layout
from compress.artifacts.manifest import MANIFEST_NAME, FileEntry, Manifest
from compress.artifacts.words import is_utf8, visible
from compress.errors import CompressError, EnvironmentLacksError, RecipeError, ResourceError, nearest
from compress.files import CHUNK

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

MOST_MANIFEST_BYTES = 64 << 20
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.:-]*://[^\s'\"]+")
_REFERENCE = re.compile(r"/[a-z0-9][a-z0-9._-]*(@[vr][0-9]{1,9})?/?$")


@dataclass(frozen=True)
class Remote:
    """A place on a file system of fsspec. `url` is shown and recorded: without user, password, query or fragment."""

    files: AbstractFileSystem
    path: str
    url: str

    def of(self, name: str, label: str) -> Remote:
        """The folder of a version there."""
        place = layout.relative_path(name, label)
        return Remote(self.files, f"{self.path.rstrip('/')}/{place}", f"{self.url.rstrip('/')}/{place}")

    def is_within(self, folder: Path) -> bool:
        """Whether this is a place on the local disk in `folder`."""
        return "file" in _protocols(self.files) and Path(self.path).resolve().is_relative_to(folder.resolve())

    def at(self, path: str) -> str:
        return f"{self.path.rstrip('/')}/{path}"


def open_remote(url: str) -> Remote:
    """The place that a URL or a local path names.

    Raises RecipeError for an unknown kind of URL or one that climbs with `..`, EnvironmentLacksError naming the package
    that would open it.
    """
    import fsspec
    from fsspec.registry import known_implementations

    if not is_utf8(url):
        raise RecipeError(f"{visible(shown(url))}: not UTF-8, so it could not be recorded; choose another place")
    if "://" not in url:
        url = f"file://{os.path.abspath(Path(url).expanduser())}"
    kind, _, rest = url.partition("://")
    if ".." in rest.replace("\\", "/").split("/"):
        raise RecipeError(f"{shown(url)}: `..` in a URL could lead anywhere; write the place out")
    shown_kind = visible(kind)
    known = sorted({*known_implementations, *fsspec.available_protocols()})
    if kind not in known:
        raise RecipeError(f"{shown(url)}: {shown_kind!r} is no kind of place that fsspec knows.{nearest(kind, known)}")
    try:
        files, path_there = fsspec.core.url_to_fs(url)
    except ImportError as error:
        needed = known_implementations.get(kind, {}).get("err", "") or str(error)
        raise EnvironmentLacksError(
            f"{shown(url)}: {kind}:// needs a package that is not installed. {needed}"
        ) from error
    except (ValueError, OSError) as error:
        raise RecipeError(f"{shown(url)}: cannot be opened ({scrubbed(error)})") from error
    return Remote(files, str(path_there), shown(url))


def split_reference(url: str, reference: str | None) -> tuple[str, str, str]:
    """(URL, name, label) of `URL/NAME@v0003`, or of `URL NAME@v3`; the label is empty for the newest.

    Raises RecipeError for names and labels that are none.
    """
    if reference is None:
        # With a secret in it, what comes after the last slash may be half of that, and would stand in a message.
        if shown(url) != url and (re.search("[?#]", url) or not _REFERENCE.search(url)):
            raise RecipeError(f"{shown(url)}: name what to pull, as URL/NAME@v0003 or URL NAME@v0003")
        place, _, reference = url.rstrip("/").rpartition("/")
        if not place or place.endswith((":", "/")):
            raise RecipeError(f"{shown(url)}: name what to pull, as URL/NAME@v0003 or URL NAME@v0003")
        url = place
    name, _, label = reference.partition("@")
    layout.check_name(name)
    whole = layout.whole_label(label) if label else ""
    if whole is None:
        raise RecipeError(f"{label!r} is no version; write {name}@v0003, or {name}@r0001 for a rejected run")
    return url, name, whole


def newest(remote: Remote, name: str) -> str:
    """The label of the newest published version of `name` there. Raises RecipeError if none can be seen."""
    with remote_errors(remote):
        try:
            remote.files.invalidate_cache()
            paths = remote.files.ls(remote.at(name), detail=False)
        except FileNotFoundError:
            paths = []
    labels = [label for path in paths if (label := str(path).rstrip("/").rsplit("/", 1)[-1]).startswith("v")]
    whole = [label for label in labels if layout.whole_label(label) == label and manifest_bytes(remote.of(name, label))]
    if not whole:
        raise RecipeError(f"{remote.url} has no published version of {name}; name one as {name}@v0003")
    return max(whole, key=lambda label: int(label[1:]))


def manifest_bytes(place: Remote) -> bytes | None:
    """The manifest there as it is; None if there is none."""
    with remote_errors(place):
        place.files.invalidate_cache()
        try:
            with place.files.open(place.at(MANIFEST_NAME), "rb") as stream:
                content = bytes(stream.read(MOST_MANIFEST_BYTES + 1))
        except FileNotFoundError:
            return None
    if len(content) > MOST_MANIFEST_BYTES:
        raise CompressError(f"{place.url}/{MANIFEST_NAME}: larger than any manifest")
    return content


def read_manifest(place: Remote, content: bytes) -> Manifest:
    """The manifest of what is there. Raises CompressError when it does not fit itself."""
    try:
        found = Manifest.model_validate_json(content)
    except ValidationError as error:
        raise CompressError(f"{place.url}/{MANIFEST_NAME}: not a valid manifest; push that version again") from error
    if found.recomputed_digest() != found.digest:
        raise CompressError(f"{place.url}/{MANIFEST_NAME}: has been edited: its digest does not fit its contents")
    return found


def size_there(place: Remote, path: str) -> int | None:
    """Bytes of a file there; None if there is none."""
    with remote_errors(place):
        place.files.invalidate_cache()
        try:
            found = place.files.info(place.at(path))
        except FileNotFoundError:
            return None
    return int(found["size"]) if found.get("type") == "file" else None


def hash_there(place: Remote, path: str) -> str:
    """sha256 of a file there, read back in pieces."""
    digest = hashlib.sha256()
    for piece in pieces(place, path):
        digest.update(piece)
    return digest.hexdigest()


def holds(place: Remote, entry: FileEntry) -> bool:
    """Whether the file is there with the bytes it should have."""
    return size_there(place, entry.path) == entry.bytes and hash_there(place, entry.path) == entry.sha256


def pieces(place: Remote, path: str) -> Iterator[bytes]:
    with remote_errors(place), place.files.open(place.at(path), "rb") as stream:
        while piece := stream.read(CHUNK):
            yield bytes(piece)


def upload(place: Remote, path: str, source: Path) -> None:
    """Write one file there, in pieces. Where a file system tells folders from names, they are made."""
    target = place.at(path)
    with remote_errors(place):
        place.files.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
        with source.open("rb") as reader, place.files.open(target, "wb") as writer:
            while piece := reader.read(CHUNK):
                writer.write(piece)


def upload_last(place: Remote, content: bytes) -> None:
    """Write the manifest there in one step: object stores do, and a local disk by a rename."""
    target = place.at(MANIFEST_NAME)
    with remote_errors(place):
        if "file" in _protocols(place.files):
            place.files.pipe_file(f"{target}.part", content)
            place.files.mv(f"{target}.part", target)
        else:
            place.files.pipe_file(target, content)


@contextmanager
def remote_errors(place: Remote) -> Iterator[None]:
    """Turn what a file system raises about `place` into an error that names it and says what it was."""
    try:
        yield
    except FileNotFoundError as error:
        raise CompressError(f"{place.url}: {scrubbed(error)} is missing there") from error
    except NotImplementedError as error:
        raise RecipeError(f"{place.url}: this kind of place cannot do that (it may be read-only)") from error
    except OSError as error:
        raise ResourceError(
            f"{place.url}: {scrubbed(error.strerror or error)}; the same command goes on from there"
        ) from error
    except Exception as error:
        # Clients of object stores have errors of their own that are no OSError.
        if type(error).__module__.split(".")[0] in ("builtins", "compress", "pydantic"):
            raise
        raise ResourceError(f"{place.url}: {scrubbed(error)}; the same command goes on from there") from error


def shown(url: str) -> str:
    """A URL that may be printed and recorded: user, password, query and fragment are left out, also of chained ones."""
    return "::".join(_shown(part) for part in url.split("::"))


def scrubbed(error: object) -> str:
    """A message of a client, with every URL in it as it may be shown."""
    return _URL.sub(lambda found: shown(found[0]), str(error))


def _shown(url: str) -> str:
    kind, separator, rest = url.partition("://")
    if not separator or kind in ("file", "local"):
        return url
    host = re.split(r"[/?#]", rest, maxsplit=1)[0]
    if "@" in host:
        rest = rest[host.rindex("@") + 1 :]
    elif ":" in host and "@" in rest and not host.rpartition(":")[2].isdigit():
        rest = rest[rest.index("@") + 1 :]  # a password with a slash in it, as those of S3 have
    return f"{kind}://{re.split('[?#]', rest, maxsplit=1)[0]}"


def _protocols(files: AbstractFileSystem) -> tuple[str, ...]:
    return (files.protocol,) if isinstance(files.protocol, str) else tuple(files.protocol)
