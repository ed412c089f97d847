"""Equal files share their bytes; damage is not spread, and what is shared can be told."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from compress.artifacts import dedupe, manifest
from compress.artifacts.audit import audit
from compress.artifacts.dedupe import shared_bytes
from compress.artifacts.store import Store
from compress.artifacts.verify import verify

from .conftest import fill, overwrite

Publish = Callable[..., Path]
WEIGHTS = "model/model.safetensors"


def same_file(one: Path, other: Path) -> bool:
    return os.path.samestat(one.stat(), other.stat())


def own_bytes(path: Path) -> int:
    """The attestation names the version and its time, so no other has the same."""
    return (path / "reports" / "attestation.json").stat().st_size


def test_equal_files_of_versions_names_and_rejected_runs_are_one_file(store: Store, publish: Publish) -> None:
    first, second, other, rejected = publish(), publish(), publish("other"), publish(verdict="failed")
    for path in (second, other, rejected):
        assert same_file(first / WEIGHTS, path / WEIGHTS)
        assert verify(path).ok
    assert not same_file(first / "manifest.json", second / "manifest.json")
    assert shared_bytes(second) == manifest.read(second).bytes - own_bytes(second)
    assert audit(store).ok


def test_files_that_differ_are_apart(store: Store, publish: Publish) -> None:
    first = publish()
    second = publish(prepare=lambda folder: (folder / "recipe.yaml").write_text("schema: 2\n"))
    assert not same_file(first / "recipe.yaml", second / "recipe.yaml")
    recipe_bytes = (second / "recipe.yaml").stat().st_size
    assert shared_bytes(second) == manifest.read(second).bytes - own_bytes(second) - recipe_bytes


def test_equal_files_within_one_version_are_linked_to_the_published_one(publish: Publish) -> None:
    first = publish()
    second = publish(prepare=lambda folder: shutil.copy(folder / WEIGHTS, folder / "model" / "copy.safetensors"))
    assert same_file(first / WEIGHTS, second / "model" / "copy.safetensors")


def test_published_files_are_read_only(publish: Publish) -> None:
    for path in publish().rglob("*"):
        if path.is_file():
            assert stat.S_IMODE(path.stat().st_mode) & 0o222 == 0, path


def test_damage_is_not_spread_to_a_new_version(publish: Publish) -> None:
    first = publish()
    content = (first / WEIGHTS).read_bytes()
    overwrite(first / WEIGHTS, content[:-1] + bytes([content[-1] ^ 1]))
    second = publish()
    assert not same_file(first / WEIGHTS, second / WEIGHTS)
    assert (verify(first).ok, verify(second).ok) == (False, True)


def test_damage_to_shared_bytes_is_named_in_every_version(store: Store, publish: Publish) -> None:
    first = publish()
    publish()
    overwrite(first / "recipe.yaml", b"schema: 2\n")
    assert [problem.split(":")[0] for problem in audit(store).problems] == [
        "demo/v0001/recipe.yaml",
        "demo/v0002/recipe.yaml",
    ]


def test_removing_one_version_leaves_the_other_whole(publish: Publish) -> None:
    first, second = publish(), publish()
    shutil.rmtree(first)
    assert verify(second).ok


@pytest.mark.parametrize("number", [errno.EMLINK, errno.EPERM, errno.EOPNOTSUPP, errno.EXDEV])
def test_where_no_link_can_be_made_the_copy_stays(
    publish: Publish, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(number, os.strerror(number))

    first = publish()
    monkeypatch.setattr(dedupe.os, "link", refuse)
    second = publish()
    assert not same_file(first / WEIGHTS, second / WEIGHTS)
    assert verify(second).ok
    assert sorted(path.name for path in (second / "model").iterdir()) == sorted(
        path.name for path in (first / "model").iterdir()
    )


def test_files_that_are_links_already_stay_as_they_are(store: Store, publish: Publish) -> None:
    """rename(2) between two links of the same file does nothing, and would leave the temporary name behind."""
    first = publish()
    with store.staging("demo") as staged:
        fill(staged)
        files = manifest.hash_files(staged)
        dedupe.share(store.root, staged, files)
        dedupe.share(store.root, staged, files)
        assert same_file(first / WEIGHTS, staged / WEIGHTS)
        assert manifest.hash_files(staged) == files


def test_a_linked_manifest_cannot_lead_out_of_the_store(store: Store, publish: Publish, tmp_path: Path) -> None:
    """A published file that is a link is not shared, whatever it points to."""
    first = publish()
    (tmp_path / "outside").write_bytes((first / WEIGHTS).read_bytes())
    (first / WEIGHTS).unlink()
    (first / WEIGHTS).symlink_to(tmp_path / "outside")
    second = publish()
    assert not (second / WEIGHTS).is_symlink()
    assert not same_file(second / WEIGHTS, tmp_path / "outside")
