"""Forked processes that meet as those of torchrun do. Everything is imported already, so they start at once."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore

from compress import parallel

SECONDS = 60
"""After which a process that has not ended counts as hanging."""


def in_processes(count: int, work: Callable[[], Any], folder: Path) -> list[Any]:
    """What `work()` returns, or the exception it raises, in each of `count` processes that have joined, by rank.

    Raises AssertionError if one does not end.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("fork")
    paths = [folder / f"rank-{rank}.pickle" for rank in range(count)]
    processes = [
        context.Process(target=_child, args=(rank, count, store.port, work, path)) for rank, path in enumerate(paths)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(SECONDS)
    hanging = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
        process.join()
    assert not hanging, f"processes {hanging} did not end"
    return [pickle.loads(path.read_bytes()) for path in paths]


def _child(rank: int, count: int, port: int, work: Callable[[], Any], path: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    # torchrun too keeps the store in a process of its own.
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    try:
        with parallel.joined():
            result = work()
    except BaseException as error:
        traceback.print_exc()
        result = error
    path.write_bytes(pickle.dumps(result))
    os._exit(0)
