"""Kills at any point of what the desk does; several processes at once; full disks; ten thousand versions."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from compress.artifacts import channels, layout, listing
from compress.artifacts.audit import audit
from compress.artifacts.collect import Rules, collect
from compress.artifacts.desk import promote, rollback, waive
from compress.artifacts.store import Store
from compress.artifacts.transport import pull, push
from compress.artifacts.verify import verify
from compress.errors import CompressError, ResourceError
from tests.helpers import run_cli

from .conftest import FACTS, KL_GATE, fill, with_gates

Publish = Callable[..., Path]
FORK = multiprocessing.get_context("fork")


def publish_one(store: Store, seed: int, verdict: str = "passed", name: str = "demo") -> Path:
    with store.staging(name) as staged:
        fill(staged, seed)
        with_gates(KL_GATE)(staged)
        return store.publish(staged, name, verdict, FACTS)  # type: ignore[arg-type]


def work(root: Path, remote: Path, seed: int) -> None:
    """Anything the desk can do, in an order that `seed` decides, until killed. Refusals are part of the day."""
    chance = random.Random(seed)
    store, other = Store(root), Store(root.parent / "other")
    while True:
        labels = [version.label for version in store.versions("demo")] or ["v0001"]
        published = [label for label in labels if label.startswith("v")] or ["v0001"]
        step = chance.choice(
            ["publish", "publish", "reject", "promote", "rollback", "waive", "collect", "push", "pull"]
        )
        with contextlib.suppress(CompressError):
            if step in ("publish", "reject"):
                publish_one(store, chance.randrange(3), "passed" if step == "publish" else "failed")
            elif step == "promote":
                promote(store, "demo", chance.choice(labels), chance.choice(channels.CHANNELS))
            elif step == "rollback":
                rollback(store, "demo", chance.choice(channels.CHANNELS))
            elif step == "waive":
                waive(store, "demo", labels[-1], ["threshold"], "a reason", "2099-01-01")
            elif step == "collect":
                collect(store, Rules(keep=4))
            elif step == "push":
                push(store, f"demo@{chance.choice(published)}", str(remote))
            else:
                pull(other, str(remote), "demo")


def check_whole(store: Store, remote: Path) -> None:
    """The store is accepted, no version is half there, and what the remote calls whole is whole."""
    found = audit(store)
    assert found.problems == ()
    other = audit(Store(store.root.parent / "other"))
    assert other.problems == ()
    for parent, rejected in ((store.root / "demo", False), (store.root / "demo" / "rejected", True)):
        for label, _ in layout.numbered(parent, rejected):
            assert (parent / label / "manifest.json").is_file(), f"{label} is half there"
    for path in remote.glob("demo/*/manifest.json"):
        assert verify(path.parent).ok, path
    for channel in channels.CHANNELS:
        held = store.promoted("demo", channel)
        assert held is None or held.path.is_dir()


def kill_again_and_again(store: Store, remote: Path, kills: int, seed: int) -> None:
    chance = random.Random(seed)
    publish_one(store, 0)
    publish_one(store, 0, "failed")
    needed = {"published", "promoted", "collected", "pushed"}
    for number in range(4 * kills):
        done = {line.event for line in store.history("demo").lines}
        if number >= kills and needed <= done:
            break
        writer = FORK.Process(target=work, args=(store.root, remote, seed * 1000 + number))
        writer.start()
        time.sleep(chance.uniform(0.002, 0.25))
        assert writer.pid is not None
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        assert writer.exitcode == -signal.SIGKILL, "the writer ended by itself: an error it did not expect"
        check_whole(store, remote)
    assert needed <= done, "too little was done to prove anything"


def test_kills_at_any_time_leave_a_whole_store(store: Store, tmp_path: Path) -> None:
    kill_again_and_again(store, tmp_path / "remote", kills=25, seed=1)


@pytest.mark.slow
def test_two_hundred_kills_leave_a_whole_store(store: Store, tmp_path: Path) -> None:
    kill_again_and_again(store, tmp_path / "remote", kills=200, seed=2)


def _each_step_dies(action: Callable[[], object], check: Callable[[], None]) -> int:
    """Run `action` in children that die at the first, second, ... call that changes the disk; `check` after each."""
    survived = deaths = 0
    while not survived:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                _die_at(deaths)
                action()
                code = 0
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        survived = int(os.WIFEXITED(status))
        assert not survived or os.WEXITSTATUS(status) == 0, "the action failed by itself"
        check()
        deaths += 1
        assert deaths < 500
    return deaths


def _die_at(number: int) -> None:
    """Replace what changes the disk by versions that count, and kill the process just before call `number`."""
    left = number

    def deadly(real: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            nonlocal left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            return real(*args, **kwargs)

        return call

    for name in ("rename", "replace", "write", "fsync", "unlink", "mkdir", "link", "chmod", "rmdir", "ftruncate"):
        setattr(os, name, deadly(getattr(os, name)))
    Path.replace = deadly(Path.replace)  # type: ignore[assignment,method-assign]


@pytest.mark.parametrize("what", ["publish", "reject", "promote", "rollback", "waive", "collect", "push", "pull"])
def test_death_before_each_single_step_leaves_a_whole_store(store: Store, tmp_path: Path, what: str) -> None:
    """Not at random times but at every call that changes the disk, one after another."""
    for number in (1, 2, 3):
        publish_one(store, number)
        promote(store, "demo", f"v{number}", "production")
    publish_one(store, 1, "failed")
    remote = tmp_path / "remote"
    other = Store(store.root.parent / "other")
    if what == "pull":
        push(store, "demo@v3", str(remote))
    actions: dict[str, Callable[[], object]] = {
        "publish": lambda: publish_one(store, 2),
        "reject": lambda: publish_one(store, 2, "failed"),
        "promote": lambda: promote(store, "demo", "v2", "staging"),
        "rollback": lambda: rollback(store, "demo", "production", to="v2"),
        "waive": lambda: waive(store, "demo", "r1", ["threshold"], "a reason", "2099-01-01"),
        "collect": lambda: collect(store, Rules(keep=1)),
        "push": lambda: push(store, "demo@v1", str(remote)),
        "pull": lambda: pull(other, str(remote), "demo@v3"),
    }
    assert _each_step_dies(actions[what], lambda: check_whole(store, remote)) > 3


# --- several at once ------------------------------------------------------------------------------------------------


def _promote_many(root: Path, label: str, count: int, go: Event) -> None:
    store = Store(root)
    go.wait()
    for number in range(count):
        promote(store, "demo", label if number % 2 else "v0001", "production", by=label)


def test_two_processes_promoting_at_once_are_one_after_the_other(store: Store, publish: Publish) -> None:
    for _ in range(3):
        publish()
    go = FORK.Event()
    writers = [FORK.Process(target=_promote_many, args=(store.root, label, 20, go)) for label in ("v0002", "v0003")]
    for writer in writers:
        writer.start()
    go.set()
    for writer in writers:
        writer.join(timeout=60)
    assert [writer.exitcode for writer in writers] == [0, 0]
    moves = [line for line in store.history("demo").lines if line.event == "promoted"]
    assert {line.who for line in moves} == {"v0002", "v0003"}
    assert [line.detail for line in moves[1:]] == [f"production held {line.version} before" for line in moves[:-1]]
    held = store.promoted("demo", "production")
    assert held is not None and held.label == moves[-1].version
    assert audit(store).ok


# --- disks ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    point = tmp_path / "disk"
    point.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(point)], capture_output=True, text=True, check=False
    )
    if made.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {made.stderr.strip()}")
    yield point
    subprocess.run(["umount", str(point)], check=True)


def test_a_full_disk_loses_nothing_and_the_store_goes_on_afterwards(small_disk: Path) -> None:
    store = Store(small_disk / "store")
    publish_one(store, 0)
    publish_one(store, 0, "failed")
    promote(store, "demo", "v1", "production")
    before = (store.root / "demo" / "channels" / "production.json").read_bytes()
    filler = small_disk / "filler"
    with filler.open("wb", buffering=0) as stream, contextlib.suppress(OSError):
        while True:
            stream.write(bytes(512))
    for action in (
        lambda: publish_one(store, 1),
        lambda: waive(store, "demo", "r1", ["threshold"], "a reason " * 600, "2099-01-01"),
        lambda: promote(store, "demo", "v1", "staging", note="a note " * 600),
    ):
        with pytest.raises(ResourceError, match="disk is full"):
            action()
    found = audit(store)
    assert found.problems == () and len(found.versions) == 2
    assert (store.root / "demo" / "channels" / "production.json").read_bytes() == before
    filler.unlink()
    assert publish_one(store, 1).name == "v0002"
    promote(store, "demo", "v2", "production")
    assert audit(store).ok


def test_a_line_that_finds_no_room_is_written_later(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    from compress.artifacts import history

    publish_one(store, 0)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(history, "_write_all", full)
        with pytest.raises(ResourceError, match="is published and whole, but its line in the history"):
            publish_one(store, 1)
    assert [version.label for version in store.versions("demo")] == ["v0001", "v0002"]
    assert audit(store).problems == ()
    publish_one(store, 2)
    assert [line.version for line in store.history("demo").lines] == ["v0001", "v0002", "v0003"]


# --- many versions --------------------------------------------------------------------------------------------------


def many_versions(root: Path, made: Path, count: int) -> None:
    """`count` copies of a published version's manifest under their own numbers, without the files."""
    content = json.loads((made / "manifest.json").read_text())
    for number in range(1, count + 1):
        folder = root / "many" / f"v{number:04d}"
        folder.mkdir(parents=True)
        text = json.dumps({**content, "name": "many", "version": folder.name}, indent=2)
        (folder / "manifest.json").write_text(text)


def test_rows_are_read_again_when_a_manifest_changes(
    store: Store, publish: Publish, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "_YOUNG_NS", 0)
    root, cache = tmp_path / "big", tmp_path / "cache"
    many_versions(root, publish(), 100)
    big = Store(root)
    first = listing.rows(big, ["many"], cache)
    assert len(first) == 100 and len(list(cache.iterdir())) == 1
    reads: list[str] = []
    real = listing._read
    monkeypatch.setattr(listing, "_read", lambda *args: reads.append(args[1]) or real(*args))
    assert listing.rows(big, ["many"], cache) == first and reads == []
    path = root / "many" / "v0007" / "manifest.json"
    times = path.stat()
    path.write_bytes(path.read_bytes().replace(b'"passed"', b'"failed"'))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    (root / "many" / "v0008" / "manifest.json").unlink()
    shutil.rmtree(root / "many" / "v0009")
    after = {row.version: row.verdict for row in listing.rows(big, ["many"], cache)}
    assert reads == ["v0007"] and after["v0007"] == "failed"
    assert "v0008" not in after and "v0009" not in after and len(after) == 98


def test_a_damaged_listing_is_forgotten(
    store: Store, publish: Publish, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "_YOUNG_NS", 0)
    many_versions(tmp_path / "big", publish(), 60)
    rows = listing.rows(Store(tmp_path / "big"), ["many"], tmp_path / "cache")
    (path,) = (tmp_path / "cache").iterdir()
    path.write_bytes(path.read_bytes().replace(b'"passed"', b'"failed"', 1))
    assert listing.rows(Store(tmp_path / "big"), ["many"], tmp_path / "cache") == rows


@pytest.mark.slow
def test_ten_thousand_versions_are_listed_in_under_a_second(publish: Publish, tmp_path: Path) -> None:
    many_versions(tmp_path / "big", publish(), 10_000)
    time.sleep(2.1)  # younger manifests are not remembered
    seconds = []  # of processors: a busy machine makes nothing of it slower but the clock
    for _ in range(4):
        before = os.times()
        ended = run_cli("list", "--json", "--store", tmp_path / "big", env={"COMPRESS_CACHE": str(tmp_path / "cache")})
        after = os.times()
        seconds.append(sum(after[2:4]) - sum(before[2:4]))
        assert ended.code == 0 and len(json.loads(ended.out)) == 10_000
    assert min(seconds[1:]) < 1.0, seconds
