"""Several processes that work on one run, each on its share of the calibration text, started by torchrun:

    torchrun --nproc-per-node 4 -m compress run recipe.yaml

    leader      rank 0: does everything a single process does, and alone reads the recipe, measures, writes and prints
    followers   the others: wait until the leader announces a stage that shares its calibration batches
                (`steps.following`), walk their share of them, and wait again

Batch i belongs to process i mod n. Batches are cut before they are dealt out, so the forward pass of each is what it
is in a single process, and the first k batches are the same ones, whoever has them: rank r holds those among the first
k at the start of its own list. What batches give is added up in float64 (`add_up`) or put back in the order of a
single process (`in_order`); each process then solves the same problem.

Nobody waits for a process that has ended: its sockets close, and the collective that waits for it raises
PeerEndedError. Between CPU tensors gloo communicates, between GPUs NCCL, one device a process. Torch's process group
exists only while a stage is shared: libraries that find one (compressed-tensors does, when the leader loads the export)
take it as a call to communicate. Outside a group every function from `count` on is that of a single process.
"""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from compress.errors import CompressError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed.distributed_c10d import Store

T = TypeVar("T")
PATIENCE = timedelta(hours=12)
"""How long a process waits for the others within a stage: one may be much slower than another. A process that has
ended is noticed at once, whatever this says."""
POLL_SECONDS = 0.1
"""Between two looks of a follower for an announcement; a blocking wait would not hear Ctrl-C."""


class PeerEndedError(CompressError):
    """Another process of this run has ended in the middle of common work."""


class _Meeting:
    """The key-value store where the processes of a run meet, and what they have said there so far."""

    def __init__(self, store: Store, rank: int, size: int) -> None:
        self.store, self.rank, self.size = store, rank, size
        self.announced = 0


_meeting: _Meeting | None = None
"""One a process, as torch keeps its process group."""


def asked() -> int:
    """Processes that torchrun has started, 1 without it. Known before anything heavy is imported."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def started_to_follow() -> bool:
    """Whether torchrun has started this process as one of the followers."""
    return asked() > 1 and int(os.environ.get("RANK") or 0) > 0


@contextmanager
def joined() -> Iterator[None]:
    """Meet the other processes where torchrun has started any."""
    global _meeting
    if asked() == 1:
        yield
        return
    import torch
    from torch.distributed.rendezvous import rendezvous

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK") or 0) % torch.cuda.device_count())
    store, rank, size = next(rendezvous("env://", int(os.environ["RANK"]), asked()))
    _meeting = _Meeting(store, rank, size)
    try:
        yield
    finally:
        _meeting = None


def met() -> int:
    """Processes that have joined this run."""
    return _meeting.size if _meeting else 1


def neighbours() -> int:
    """Other processes of this run on this machine, which take memory beside this one."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or 1) - 1 if _meeting else 0


def announce(value: Any) -> None:
    """Tell every follower something that can be pickled; returns at once."""
    assert _meeting is not None
    _meeting.announced += 1
    _meeting.store.set(f"compress/announced/{_meeting.announced}", pickle.dumps(value).hex())


def announced() -> Any:
    """What the leader announces next; waits for it. Raises PeerEndedError if the place of meeting is gone."""
    assert _meeting is not None
    _meeting.announced += 1
    key = f"compress/announced/{_meeting.announced}"
    with _peers():
        while not _meeting.store.check([key]):
            time.sleep(POLL_SECONDS)
        return pickle.loads(bytes.fromhex(_meeting.store.get(key).decode()))


@contextmanager
def group() -> Iterator[None]:
    """Common work, entered by all processes after the same announcement: inside, `count` is their number.

    Leaving it, by an error too, closes the connections; whoever waits for this process then raises PeerEndedError.
    """
    import torch
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore

    assert _meeting is not None
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    store = PrefixStore(f"compress/group/{_meeting.announced}", _meeting.store)
    with _peers():
        dist.init_process_group(backend, store=store, rank=_meeting.rank, world_size=_meeting.size, timeout=PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()


def count() -> int:
    """Processes in the group, 1 outside."""
    import torch.distributed as dist

    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number in the group, 0 for the leader and outside."""
    import torch.distributed as dist

    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def leads() -> bool:
    """Whether this process is the one that writes."""
    return rank() == 0


def share(items: list[T]) -> list[T]:
    """The items that belong to this process: every n-th one, from `rank` on."""
    return items[rank() :: count()]


def among_first(number: int) -> int:
    """How many of the first `number` items `share` gives to this process; they are the first ones of its share.

    Example: of the first 3 items, two processes have 2 (items 0 and 2) and 1 (item 1).
    """
    return len(range(rank(), number, count()))


def in_order(mine: list[T]) -> list[T]:
    """The items of all processes, in the order that `share` dealt them out from."""
    if count() == 1:
        return mine
    import torch.distributed as dist

    dealt: list[list[T]] = [[] for _ in range(count())]
    with _peers():
        dist.all_gather_object(dealt, mine)
    return [dealt[number % count()][number // count()] for number in range(sum(map(len, dealt)))]


def from_leader(value: T) -> T:
    """The leader's value, on every process; anything that can be pickled."""
    if count() == 1:
        return value
    import torch.distributed as dist

    box: list[Any] = [value]
    with _peers():
        dist.broadcast_object_list(box, src=0)
    received: T = box[0]
    return received


def add_up(tensor: Tensor) -> None:
    """Replace a contiguous tensor, of one shape everywhere, by its sum over the processes: the same bits on each."""
    if count() > 1:
        import torch.distributed as dist

        with _peers():
            dist.all_reduce(tensor)


def total(number: int) -> int:
    """The sum of a count over the processes."""
    if count() == 1:
        return number
    import torch

    box = torch.tensor([number])
    add_up(box)
    return int(box)


@contextmanager
def _peers() -> Iterator[None]:
    """Errors of a collective in words: what goes wrong inside one is that somebody is no longer there."""
    try:
        yield
    except RuntimeError as error:
        raise PeerEndedError(
            "another process of this run has ended while this one waited for it; its own message says why. Finished "
            "blocks are kept: the same command goes on where this one stopped."
        ) from error
