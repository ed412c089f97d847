"""Two processes at once, and processes killed at any point: nothing collides and nothing is half there."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from multiprocessing.synchronize import Event
from pathlib import Path

from compress.artifacts.store import Store
from compress.artifacts.verify import verify

from .conftest import FACTS, fill

FORK = multiprocessing.get_context("fork")


def _publish_many(root: Path, count: int, go: Event) -> None:
    store = Store(root)
    go.wait()
    for seed in range(count):
        with store.staging("demo") as staged:
            fill(staged, seed)
            store.publish(staged, "demo", "passed", FACTS)


def test_two_processes_publishing_at_once_get_different_numbers(store: Store) -> None:
    go = FORK.Event()
    writers = [FORK.Process(target=_publish_many, args=(store.root, 10, go)) for _ in range(2)]
    for writer in writers:
        writer.start()
    go.set()
    for writer in writers:
        writer.join(timeout=30)
    assert [writer.exitcode for writer in writers] == [0, 0]
    versions = store.versions("demo")
    assert [version.label for version in versions] == [f"v{number:04d}" for number in range(1, 21)]
    assert [verify(version.path).problems for version in versions] == [()] * 20
    assert os.listdir(store.root / ".staging") == []


def test_a_killed_publisher_leaves_nothing_half_there(store: Store) -> None:
    go = FORK.Event()
    go.set()
    chance = random.Random(0)
    published: set[Path] = set()
    for _ in range(40):
        writer = FORK.Process(target=_publish_many, args=(store.root, 1000, go))
        writer.start()
        time.sleep(chance.uniform(0.001, 0.06))
        assert writer.pid is not None
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        now = {version.path for version in store.versions("demo")}
        assert published <= now
        assert all(verify(path).ok for path in now - published)
        published = now
    # Every numbered folder is an artifact: none without a manifest was hidden from the list.
    assert {path for path in (store.root / "demo").iterdir() if path.is_dir()} == published
    assert published, "no publish ever finished: the kills came too early to prove anything"


def test_the_next_writer_sweeps_what_a_dead_one_left_and_takes_its_lock(store: Store) -> None:
    child = os.fork()
    if child == 0:
        with store.staging("demo") as staged, store.reserve("demo", rejected=False):
            fill(staged)
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert len(os.listdir(store.root / ".staging")) == 2
    with store.staging("demo") as staged:
        assert sorted(os.listdir(store.root / ".staging")) == sorted([staged.name, f"{staged.name}.lock"])
        fill(staged)
        assert store.publish(staged, "demo", "passed", FACTS).name == "v0001"
