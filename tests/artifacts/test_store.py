"""Numbers, names and references of the store, and the errors of a disk that will not take an artifact."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from compress.artifacts import manifest
from compress.artifacts.store import Store, check_writable
from compress.artifacts.verify import verify
from compress.errors import RecipeError, ResourceError

from .conftest import FACTS, fill

Publish = Callable[..., Path]


def test_versions_count_up_and_rejected_runs_have_their_own_numbers(store: Store, publish: Publish) -> None:
    paths = [publish(), publish(verdict="failed"), publish(), publish(verdict="inconclusive")]
    relative = [path.relative_to(store.root).as_posix() for path in paths]
    assert relative == ["demo/v0001", "demo/rejected/r0001", "demo/v0002", "demo/rejected/r0002"]
    assert [version.label for version in store.versions("demo")] == ["v0001", "v0002", "r0001", "r0002"]
    assert manifest.read(paths[3]).verdict == "inconclusive"
    assert store.predict_next_version("demo") == "v0003"


def test_a_number_below_the_highest_is_never_reused(store: Store, publish: Publish) -> None:
    first = publish()
    publish()
    first.rename(store.root / "elsewhere")
    assert publish().name == "v0003"


def test_a_folder_without_manifest_is_not_listed_but_keeps_its_number(store: Store, publish: Publish) -> None:
    publish()
    (store.root / "demo" / "v0002").mkdir()
    assert [version.label for version in store.versions("demo")] == ["v0001"]
    assert publish().name == "v0003"


def test_numbers_sort_as_numbers_beyond_four_digits(store: Store, publish: Publish) -> None:
    publish().rename(store.root / "demo" / "v9999")
    assert publish().name == "v10000"
    assert store.find("demo").name == "v10000"


def test_the_report_can_name_the_version_it_will_lie_in(store: Store) -> None:
    with store.staging("demo") as staged, store.reserve("demo", rejected=False) as slot:
        fill(staged)
        (staged / "reports" / "report.json").write_text(f'"{slot.label} at {slot.path}"')
        path = slot.publish(staged, "passed", FACTS)
    assert (path / "reports" / "report.json").read_text() == f'"v0001 at {path}"'


def test_a_failed_verdict_cannot_take_a_published_number(store: Store) -> None:
    with store.staging("demo") as staged, store.reserve("demo", rejected=False) as slot:
        fill(staged)
        with pytest.raises(ValueError, match="does not fit the verdict"):
            slot.publish(staged, "failed", FACTS)


def test_staging_is_removed_after_an_error_and_after_publishing(store: Store, publish: Publish) -> None:
    publish()
    with pytest.raises(KeyError), store.staging("demo") as staged:
        fill(staged)
        raise KeyError
    assert os.listdir(store.root / ".staging") == []


def test_staging_leaves_the_folders_of_living_writers_alone(store: Store) -> None:
    with store.staging("demo") as first, store.staging("demo") as second:
        assert first != second
        assert store.sweep() == []
        assert first.is_dir()


def test_a_copy_of_a_published_folder_can_be_published(store: Store, publish: Publish) -> None:
    """Published files are read-only, and so are copies of them."""
    first = publish()
    with store.staging("demo") as staged:
        shutil.copytree(first, staged, dirs_exist_ok=True)
        second = store.publish(staged, "demo", "passed", FACTS)
    assert manifest.read(second).version == "v0002"
    assert verify(second).ok and verify(first).ok


def test_links_are_not_published(store: Store) -> None:
    with store.staging("demo") as staged:
        fill(staged)
        (staged / "model" / "leak").symlink_to("/etc")
        with pytest.raises(manifest.ManifestError, match="leak"):
            store.publish(staged, "demo", "passed", FACTS)
    assert store.versions("demo") == []


# --- names and references -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["..", ".", "", "../x", "a/b", "/etc", ".hidden", "Demo", "a\n", "a b", "x" * 65, "-rf", "a\0", "é"]
)
def test_a_name_that_is_not_one_folder_in_the_store_is_refused(store: Store, name: str) -> None:
    with pytest.raises(RecipeError), store.staging(name):
        pytest.fail("a folder was made")
    with pytest.raises(RecipeError), store.reserve(name, rejected=False):
        pytest.fail("a number was given out")
    assert not store.root.exists()


@pytest.mark.parametrize("link", ["demo", "demo/rejected"])
def test_a_linked_folder_that_leads_outside_is_refused(store: Store, tmp_path: Path, link: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (store.root / link).parent.mkdir(parents=True)
    (store.root / link).symlink_to(outside)
    with pytest.raises(RecipeError, match="link"), store.reserve("demo", rejected=True):
        pytest.fail("a number was given out")
    assert store.names() == []
    assert list(outside.iterdir()) == []


def test_a_version_that_is_a_link_is_not_found(store: Store, publish: Publish) -> None:
    first = publish()
    (store.root / "demo" / "v0002").symlink_to(first)
    assert store.find("demo") == first


def test_find_takes_names_versions_rejected_runs_and_paths(store: Store, publish: Publish) -> None:
    first, second, rejected = publish(), publish(), publish(verdict="failed")
    assert store.find("demo") == second
    assert store.find("demo@v0001") == store.find("demo@v1") == first
    assert store.find("demo@r0001") == rejected
    assert store.find(str(first)) == first
    assert store.names() == ["demo"]


@pytest.mark.parametrize(
    ("reference", "help"),
    [
        ("demmo", 'Did you mean "demo"'),
        ("demo@v0009", "newest is v0001"),
        ("demo@latest", "no version"),
        ("bad", "rejected run is bad@r0001"),
        ("./nowhere", "no artifact there"),
        ("..", "cannot name an artifact"),
    ],
)
def test_an_unknown_reference_is_answered_with_help(store: Store, publish: Publish, reference: str, help: str) -> None:
    publish()
    publish("bad", verdict="failed")
    with pytest.raises(RecipeError, match=help):
        store.find(reference)


def test_an_absent_store_is_empty(store: Store) -> None:
    assert store.names() == []
    with pytest.raises(RecipeError, match="There is no"):
        store.find("demo")


# --- disks ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB; skipped, with mount's own words, where mounting is not permitted."""
    point = tmp_path / "disk"
    point.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(point)], capture_output=True, text=True, check=False
    )
    if made.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {made.stderr.strip()}")
    yield point
    subprocess.run(["umount", str(point)], check=True)


def test_a_disk_that_fills_up_is_a_resource_error_and_loses_nothing_published(small_disk: Path) -> None:
    store = Store(small_disk / "store")
    with store.staging("demo") as staged:
        fill(staged)
        kept = store.publish(staged, "demo", "passed", FACTS)
    with pytest.raises(ResourceError, match="disk is full; free some space"), store.staging("demo") as staged:
        fill(staged)
        (staged / "model" / "more").write_bytes(bytes(1 << 20))
    assert [version.path for version in store.versions("demo")] == [kept]
    assert os.listdir(store.root / ".staging") == []


def test_a_disk_too_full_for_the_manifest_publishes_nothing(small_disk: Path) -> None:
    store = Store(small_disk / "store")
    with pytest.raises(ResourceError, match="disk is full"), store.staging("demo") as staged:
        fill(staged)
        with store.reserve("demo", rejected=False) as slot:
            with (staged / "filler").open("wb") as stream, pytest.raises(OSError, match="No space"):
                while True:
                    stream.write(bytes(1024))
                    stream.flush()
            slot.publish(staged, "passed", FACTS)
    assert store.versions("demo") == []


def test_a_read_only_store_is_refused_before_work_starts(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(ResourceError, match=r"store.*read-only; choose a store that can be written"):
        check_writable(small_disk / "store")
    with pytest.raises(ResourceError, match="read-only"), Store(small_disk / "store").staging("demo"):
        pytest.fail("a folder was made")


def test_check_writable_makes_the_store_and_leaves_no_probe(store: Store) -> None:
    check_writable(store.root)
    assert os.listdir(store.root / ".staging") == []
    with pytest.raises(ResourceError, match="bytes are needed"):
        check_writable(store.root, needed_bytes=1 << 60)


def test_a_store_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="a file is where a folder should be"):
        check_writable(tmp_path / "file" / "store")


def test_an_error_about_another_place_is_not_blamed_on_the_store(store: Store) -> None:
    with pytest.raises(PermissionError), store.staging("demo"):
        raise PermissionError(errno.EACCES, "Permission denied", "/somewhere/else")
