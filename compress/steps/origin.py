"""What the source says of itself, for the model card: licence and languages. Nothing is guessed.

A folder or hub repository says it in the front matter of its README.md, else in config.json; a .gguf file in its
metadata (general.license, general.languages).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from compress.checkpoints.sources import Source

_KEYS = ("license", "license_name", "license_link", "language")


def described(source: Source) -> dict[str, Any]:
    """{licence, licence_name, licence_link, language (a list), described_by}; a key only where its value is known."""
    places: tuple[tuple[Callable[[Source], Mapping[str, Any]], str], ...] = (
        (_readme, "README.md"),
        (_config, "config.json"),
        (_gguf, "metadata of the .gguf"),
    )
    for read, where in places:
        found = read(source)
        if any(found.get(key) for key in _KEYS):
            return {**_clean(found), "described_by": f"{where} of the source"}
    return {}


def _clean(found: Mapping[str, Any]) -> dict[str, Any]:
    languages = found.get("language")
    listed = [languages] if isinstance(languages, str) else languages if isinstance(languages, list) else []
    texts = {
        key.replace("license", "licence"): value
        for key in ("license", "license_name", "license_link")
        if isinstance(value := found.get(key), str) and value
    }
    return {**texts, **({"language": [str(each) for each in listed]} if listed else {})}


def _readme(source: Source) -> Mapping[str, Any]:
    """The front matter of the first README.md there is: beside the weights, where the source was named, on the hub."""
    from huggingface_hub import metadata_load

    for path in _readmes(source):
        try:
            found = metadata_load(path) if path.is_file() else None
        except (OSError, ValueError, yaml.YAMLError):  # prose without front matter, or with a broken one
            found = None
        if isinstance(found, dict):
            return found
    return {}


def _readmes(source: Source) -> Iterator[Path]:
    """Where one may be, the nearest first; the hub is asked only if none was good enough before."""
    yield source.folder / "README.md"
    named, repo = source.facts.get("path"), source.facts.get("id")
    if isinstance(named, str):
        yield Path(named) / "README.md"
    if isinstance(repo, str):
        yield from _from_hub(repo, source.facts.get("revision"))


def _from_hub(repo: str, revision: str | None) -> Iterator[Path]:
    """Fetched, or from the local cache; nothing where the hub has none or cannot be reached."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield Path(hf_hub_download(repo, "README.md", revision=revision))
    except (HfHubHTTPError, OSError, ValueError):
        return


def _config(source: Source) -> Mapping[str, Any]:
    found = json.loads((source.folder / "config.json").read_text(encoding="utf-8"))
    return found if isinstance(found, dict) else {}


def _gguf(source: Source) -> Mapping[str, Any]:
    path = source.facts.get("path")
    if not isinstance(path, str) or not path.endswith(".gguf"):
        return {}
    from gguf import GGUFReader

    fields = GGUFReader(path).fields
    names = {
        "general.license": "license",
        "general.license.name": "license_name",
        "general.license.link": "license_link",
        "general.languages": "language",
    }
    return {ours: fields[theirs].contents() for theirs, ours in names.items() if theirs in fields}
