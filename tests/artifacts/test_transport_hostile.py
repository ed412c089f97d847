"""URLs with secrets in them, and places that somebody else filled: nothing leaks or crashes, nothing odd gets in."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compress.artifacts import remote
from compress.artifacts.audit import audit
from compress.artifacts.store import Store
from compress.artifacts.transport import pull, push
from compress.errors import CompressError, RecipeError

Publish = Callable[..., Path]
SECRETS = ("SECRETPW", "TOKEN", "AKIA")


@pytest.fixture
def other(tmp_path: Path) -> Store:
    return Store(tmp_path / "other")


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("ftp://anna:SECRETPW@host/models?token=TOKEN", "ftp://host/models"),
        ("s3://AKIA:SECRETPW@bucket/x", "s3://bucket/x"),
        ("s3://AKIA:SECRETPW/TOKEN@bucket/demo@v1", "s3://bucket/demo@v1"),
        ("s3://AKIA:SECRETPW#TOKEN@bucket/x", "s3://bucket/x"),
        ("https://host/x?sig=TOKEN", "https://host/x"),
        ("https://host/x?sig=TOKEN@/y", "https://host/x"),
        ("https://host:443/x#TOKEN", "https://host:443/x"),
        ("https://host:443/demo@v1", "https://host:443/demo@v1"),
        ("simplecache::s3://AKIA:SECRETPW@bucket/x", "simplecache::s3://bucket/x"),
        ("zip://a.zip::https://u:SECRETPW@h/x?t=TOKEN", "zip://a.zip::https://h/x"),
        ("s3://bucket/models", "s3://bucket/models"),
        ("file:///a#b/c?d", "file:///a#b/c?d"),
        ("/a/b@c", "/a/b@c"),
    ],
)
def test_a_url_is_shown_without_its_secrets(url: str, shown: str) -> None:
    assert remote.shown(url) == shown


@pytest.mark.parametrize(
    "url",
    [
        "s3://AKIA:SECRETPW@bucket/x",
        "s4://AKIA:SECRETPW@bucket/x",
        "s3://AKIA:SECRETPW@bucket/../x",
        "memory://AKIA:SECRETPW@host/../x?sig=TOKEN#TOKEN",
        "gs://bucket/x?sig=TOKEN",
        "simplecache::s3://AKIA:SECRETPW@bucket/x",
    ],
)
def test_no_message_of_a_push_holds_a_secret(store: Store, publish: Publish, url: str) -> None:
    publish()
    with pytest.raises(CompressError) as raised:
        push(store, "demo@v1", url)
    assert not [secret for secret in SECRETS if secret in str(raised.value)]


@pytest.mark.parametrize(
    "url",
    [
        "https://u:SECRETPW@h",
        "https://u:SECRETPW@h/",
        "https://u:a/SECRETPW@h",
        "s4://u:SECRETPW@h/demo@v1",
        "s3://u:SECRETPW@h/demo@v1",
        "https://h/demo@v1?sig=TOKEN",
        "https://h/x?sig=a/TOKEN",
        "memory://u:SECRETPW@h/demo@v1",
        "memory://u:SECRETPW@h/demo",
    ],
)
def test_no_message_of_a_pull_holds_a_secret(other: Store, url: str) -> None:
    with pytest.raises(CompressError) as raised:
        pull(other, url)
    assert not [secret for secret in SECRETS if secret in str(raised.value)]


def test_what_a_client_says_is_shown_without_secrets() -> None:
    said = "404, message='Not Found', url='https://u:SECRETPW@h/x?sig=TOKEN'"
    assert remote.scrubbed(said) == "404, message='Not Found', url='https://h/x'"


# --- crafted manifests ----------------------------------------------------------------------------------------------


@pytest.fixture
def crafted(store: Store, publish: Publish, tmp_path: Path) -> Callable[..., str]:
    """crafted(change) -> a URL with demo@v0001, whose manifest `change` was applied to and fits itself again."""

    def craft(change: Callable[[dict[str, Any]], None]) -> str:
        publish()
        push(store, "demo@v1", str(tmp_path / "remote"))
        path = tmp_path / "remote" / "demo" / "v0001" / "manifest.json"
        content = json.loads(path.read_text())
        change(content)
        content["files"].sort(key=lambda entry: entry["path"])
        del content["digest"]
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        path.write_text(json.dumps({**content, "digest": hashlib.sha256(text.encode()).hexdigest()}))
        return f"{tmp_path}/remote"

    return craft


def empty_file(path: str) -> dict[str, Any]:
    return {"path": path, "bytes": 0, "sha256": hashlib.sha256().hexdigest()}


@pytest.mark.parametrize(
    "path",
    ["recipe.yaml/x", "n" * 300, "a/" * 600 + "a", "a\0b", "manifest.json", "manifest.json/x", "ä" * 130],
    ids=["below a file", "long name", "long path", "NUL", "the manifest", "below the manifest", "long in bytes"],
)
def test_a_manifest_with_a_path_that_cannot_be_is_refused(crafted: Callable[..., str], other: Store, path: str) -> None:
    url = crafted(lambda content: content["files"].append(empty_file(path)))
    with pytest.raises(CompressError, match="not a valid manifest"):
        pull(other, url, "demo@v1")
    assert other.names() == [] and audit(other).ok


@pytest.mark.parametrize("verdict", ["failed", "inconclusive"])
def test_a_verdict_that_does_not_belong_under_its_label_is_not_brought_in(
    crafted: Callable[..., str], other: Store, verdict: str
) -> None:
    url = crafted(lambda content: content.update(verdict=verdict))
    with pytest.raises(CompressError, match=f"the verdict {verdict} does not belong under v0001"):
        pull(other, url, "demo@v1")
    assert other.names() == [] and audit(other).ok


def test_a_store_does_not_push_to_itself(store: Store, publish: Publish) -> None:
    publish()
    for place in (store.root, store.root / "demo"):
        with pytest.raises(RecipeError, match="inside the store itself"):
            push(store, "demo@v1", str(place))
    assert audit(store).ok
