"""Push and pull: the same bytes arrive, interrupted ones go on, and nothing is ever replaced."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest

from compress.artifacts import remote, transport
from compress.artifacts.audit import audit
from compress.artifacts.collect import Rules, collect
from compress.artifacts.store import Store
from compress.artifacts.transport import pull, push, unfinished_pulls
from compress.artifacts.verify import verify
from compress.errors import CompressError, EnvironmentLacksError, RecipeError, ResourceError

from .conftest import FACTS, fill, overwrite

Publish = Callable[..., Path]
FILES = 6


# Kinds of object stores whose clients and servers are at hand: scripts/object_stores.py starts those.
BUCKETS = [f"{kind}-bucket" for kind in os.environ.get("COMPRESS_OBJECT_STORES", "").split()]


@pytest.fixture(params=["file", "memory", *BUCKETS])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    kind, bucket, _ = request.param.partition("-bucket")
    if bucket:
        name = f"b{secrets.token_hex(8)}"
        fsspec.filesystem(kind).mkdir(name)
        yield f"{kind}://{name}/models"
        return
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    memory.pseudo_dirs[:] = [""]
    yield f"file://{tmp_path}/remote" if request.param == "file" else "memory://models/remote"
    memory.store.clear()


@pytest.fixture
def other(tmp_path: Path) -> Store:
    return Store(tmp_path / "other")


def write(url: str, path: str, content: bytes) -> None:
    files, root = fsspec.core.url_to_fs(url)
    files.makedirs(f"{root}/{path}".rpartition("/")[0], exist_ok=True)
    files.pipe_file(f"{root}/{path}", content)


def read(url: str, path: str) -> bytes:
    files, root = fsspec.core.url_to_fs(url)
    return bytes(files.cat_file(f"{root}/{path}"))


@pytest.mark.parametrize("verdict", ["passed", "failed"])
def test_what_is_pushed_is_pulled_byte_for_byte(
    store: Store, other: Store, publish: Publish, url: str, verdict: str
) -> None:
    path = publish(verdict=verdict)
    label = path.name
    pushed = push(store, f"demo@{label}", url, by="anna")
    assert (pushed.copied, pushed.skipped) == (FILES, 0)
    pulled = pull(other, f"{url}/demo@{label}")
    assert pulled.version.path == other.root / path.relative_to(store.root)
    for file in path.rglob("*"):
        if file.is_file():
            assert (pulled.version.path / file.relative_to(path)).read_bytes() == file.read_bytes()
    assert verify(pulled.version.path).ok
    assert audit(store).ok and audit(other).ok
    line = store.history("demo").lines[-1]
    assert (line.event, line.who, line.detail) == ("pushed", "anna", pushed.url)
    assert [(line.event, line.version) for line in other.history("demo").lines] == [("pulled", label)]
    assert list((other.root / ".staging").iterdir()) == []


def test_pushing_and_pulling_again_copies_nothing(store: Store, other: Store, publish: Publish, url: str) -> None:
    publish()
    push(store, "demo", url)
    assert (push(store, "demo", url).copied, push(store, "demo", url).skipped) == (0, FILES)
    pull(other, f"{url}/demo@v1")
    again = pull(other, url, "demo@v1")
    assert (again.copied, again.skipped) == (0, FILES)
    assert len(other.history("demo").lines) == 1


def test_a_name_alone_is_the_newest_published_version(store: Store, other: Store, publish: Publish, url: str) -> None:
    for _ in range(10):
        publish()
    for number in (9, 10):
        push(store, f"demo@v{number}", url)
    write(url, "demo/v0011/recipe.yaml", b"no manifest yet")
    assert pull(other, url, "demo").version.label == "v0010"
    with pytest.raises(RecipeError, match="no published version of nothing"):
        pull(other, url, "nothing")


def test_an_interrupted_push_goes_on(
    store: Store, other: Store, publish: Publish, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = publish()
    real, count = remote.upload, 0

    def fail_at_third(place: remote.Remote, name: str, source: Path) -> None:
        nonlocal count
        count += 1
        if count == 3:
            write(url, f"demo/v0001/{name}", source.read_bytes()[:7])
            raise KeyboardInterrupt
        real(place, name, source)

    monkeypatch.setattr(remote, "upload", fail_at_third)
    with pytest.raises(KeyboardInterrupt):
        push(store, "demo", url)
    with pytest.raises(RecipeError, match="there is no version"):
        pull(other, f"{url}/demo@v1")
    monkeypatch.setattr(remote, "upload", real)
    write(url, "demo/v0001/manifest.json", (path / "manifest.json").read_bytes()[:100])
    done = push(store, "demo", url)
    assert (done.copied, done.skipped) == (FILES - 2, 2)
    assert verify(pull(other, f"{url}/demo@v1").version.path).ok


def test_an_interrupted_pull_goes_on(
    store: Store, other: Store, publish: Publish, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish()
    push(store, "demo", url)
    real, count = remote.pieces, 0

    def fail_at_third(place: remote.Remote, path: str) -> Iterator[bytes]:
        nonlocal count
        count += 1
        if count == 3:
            yield b"half"
            raise KeyboardInterrupt
        yield from real(place, path)

    monkeypatch.setattr(remote, "pieces", fail_at_third)
    with pytest.raises(KeyboardInterrupt):
        pull(other, url, "demo@v1")
    assert other.names() == [] and audit(other).ok
    monkeypatch.setattr(remote, "pieces", real)
    assert other.sweep() == []
    done = pull(other, url, "demo@v1")
    assert (done.copied, done.skipped) == (FILES - 2, 2)
    assert audit(other).ok


def test_what_killed_pulls_left_can_be_removed(
    store: Store, other: Store, publish: Publish, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish()
    push(store, "demo", url)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(transport, "_publish", stop)
    with pytest.raises(KeyboardInterrupt):
        pull(other, url, "demo@v1")
    ((folder, size),) = unfinished_pulls(other, remove=False)
    assert folder.is_dir() and size > 0
    unfinished_pulls(other, remove=True)
    assert list((other.root / ".staging").iterdir()) == []


def test_another_version_at_the_remote_is_never_replaced(
    store: Store, other: Store, publish: Publish, url: str
) -> None:
    publish()
    push(store, "demo", url)
    before = {path: read(url, f"demo/v0001/{path}") for path in ("manifest.json", "model/model.safetensors")}
    with other.staging("demo") as staged:
        fill(staged, seed=9)
        other.publish(staged, "demo", "passed", FACTS)
    with pytest.raises(RecipeError, match="another version is there"):
        push(other, "demo", url)
    with pytest.raises(RecipeError, match="demo@v0001 is another version here"):
        pull(other, url, "demo@v1")
    assert {path: read(url, f"demo/v0001/{path}") for path in before} == before


def test_a_collected_number_is_not_given_to_another_version(
    store: Store, other: Store, publish: Publish, url: str
) -> None:
    publish()
    push(store, "demo", url)
    for seed in (7, 8):
        with other.staging("demo") as staged:
            fill(staged, seed)
            other.publish(staged, "demo", "passed", FACTS)
    assert [each.version.label for each in collect(other, Rules(keep=1)).gone] == ["v0001"]
    with pytest.raises(RecipeError, match="was another version here once"):
        pull(other, url, "demo@v1")


@pytest.mark.parametrize("file", ["model/model.safetensors", "recipe.yaml", "manifest.json"])
def test_damage_at_the_remote_is_named_and_not_brought_in_and_files_can_be_pushed_again(
    store: Store, other: Store, publish: Publish, url: str, file: str
) -> None:
    publish()
    push(store, "demo", url)
    content = read(url, f"demo/v0001/{file}")
    write(url, f"demo/v0001/{file}", content.replace(b"passed", b"failed") if "json" in file else content + b"\n")
    with pytest.raises(CompressError, match=file.replace(".", r"\.")):
        pull(other, url, "demo@v1")
    assert other.names() == []
    if file == "manifest.json":
        with pytest.raises(RecipeError, match="another version is there"):
            push(store, "demo", url)
    else:
        assert push(store, "demo", url).copied == 1
        assert verify(pull(other, url, "demo@v1").version.path).ok


def test_a_damaged_version_is_not_pushed(store: Store, publish: Publish, url: str) -> None:
    overwrite(publish() / "recipe.yaml", b"schema: 9\n")
    with pytest.raises(CompressError, match=r"goes nowhere(.|\n)*recipe\.yaml"):
        push(store, "demo", url)
    files, root = fsspec.core.url_to_fs(url)
    assert not files.exists(root)


def test_a_manifest_that_lists_a_path_outside_is_refused(
    store: Store, other: Store, publish: Publish, url: str, tmp_path: Path
) -> None:
    publish()
    push(store, "demo", url)
    content = json.loads(read(url, "demo/v0001/manifest.json"))
    content["files"][0]["path"] = "../../../../escaped"
    write(url, "demo/v0001/manifest.json", json.dumps(content).encode())
    with pytest.raises(CompressError, match="not a valid manifest"):
        pull(other, url, "demo@v1")
    assert not list(tmp_path.rglob("escaped"))


@pytest.mark.parametrize("reference", ["../demo@v1", "demo@../v1", "demo@latest", "/etc@v1", "Demo@v1"])
def test_references_that_could_lead_elsewhere_are_refused(other: Store, url: str, reference: str) -> None:
    with pytest.raises(RecipeError, match=r"cannot name an artifact|is no version"):
        pull(other, url, reference)


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("memory://a/../b", "could lead anywhere"),
        ("file:///tmp/../etc", "could lead anywhere"),
        ("memry://a", 'Did you mean "memory"'),
    ],
)
def test_places_that_are_none_are_answered_with_help(store: Store, publish: Publish, place: str, says: str) -> None:
    publish()
    with pytest.raises(RecipeError, match=says):
        push(store, "demo", place)


@pytest.mark.parametrize("kind", ["s3", "gs", "abfs"])
def test_a_missing_package_is_named(store: Store, publish: Publish, kind: str) -> None:
    package = {"s3": "s3fs", "gs": "gcsfs", "abfs": "adlfs"}[kind]
    try:
        __import__(package)
        pytest.skip(f"{package} is installed")
    except ImportError:
        pass
    publish()
    with pytest.raises(EnvironmentLacksError, match=package):
        push(store, "demo", f"{kind}://bucket/models")


def test_a_password_in_a_url_is_not_recorded() -> None:
    assert remote.shown("ftp://anna:secret@host/models?token=1") == "ftp://host/models"
    assert remote.shown("s3://bucket/models") == "s3://bucket/models"


def test_a_pull_that_died_before_the_rename_is_abandoned(
    store: Store, other: Store, publish: Publish, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish()
    push(store, "demo", url)

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(transport.os, "rename", die)
    with pytest.raises(KeyboardInterrupt):
        pull(other, url, "demo@v1")
    monkeypatch.undo()
    found = audit(other)
    assert found.ok and "line 1 (pulled) was not carried out" in "\n".join(found.notes)
    pull(other, url, "demo@v1")
    assert [line.event for line in other.history("demo").lines] == ["pulled", "abandoned", "pulled"]
    assert audit(other).ok


def test_a_pulled_version_shares_bytes_with_what_is_here(store: Store, publish: Publish, tmp_path: Path) -> None:
    publish()
    push(store, "demo", str(tmp_path / "remote"))
    here = Store(tmp_path / "here")
    with here.staging("mine") as staged:
        fill(staged)
        mine = here.publish(staged, "mine", "passed", FACTS)
    theirs = pull(here, str(tmp_path / "remote"), "demo@v1").version.path
    weights = "model/model.safetensors"
    assert os.path.samestat((mine / weights).stat(), (theirs / weights).stat())


def test_a_place_that_cannot_be_written_is_a_resource_error(store: Store, publish: Publish, tmp_path: Path) -> None:
    publish()
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="file"):
        push(store, "demo", str(tmp_path / "file" / "below"))


def test_a_remote_copy_of_the_store_can_be_pulled_from(
    store: Store, other: Store, publish: Publish, tmp_path: Path
) -> None:
    """A store is laid out as a remote is."""
    publish()
    shutil.copytree(store.root, tmp_path / "copy")
    assert audit(Store(tmp_path / "copy")).ok
    assert pull(other, f"{tmp_path}/copy/demo@v0001").copied == FILES
