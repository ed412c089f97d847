"""Disk beside a GPU's work: the next block is read, and the last one written, in threads of their own.

On a CPU both happen when asked, in the caller's thread: there the threads would take cores from the work itself, and a
second block memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from compress.checkpoints.reader import Checkpoint

State = dict[str, Tensor]


class ReadAhead:
    """The tensors of modules that are asked for in a known order; the next one is on its way to a GPU meanwhile.

    Packed checkpoints are read when asked. All reading uses one stream: memory that was freed on a stream is only used
    again on it.
    """

    def __init__(self, checkpoint: Checkpoint, paths: list[str], device: torch.device, dtype: torch.dtype) -> None:
        self.checkpoint, self.device, self.dtype = checkpoint, device, dtype
        self._after = dict(itertools.pairwise(paths))
        self._reading: tuple[str, Future[State]] | None = None
        ahead = device.type == "cuda" and not checkpoint.schemes
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="read ahead") if ahead else None
        self._stream = _stream(device)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._reading = None
        if self._thread:
            self._thread.shutdown(cancel_futures=True)

    def state(self, path: str) -> State:
        """Every tensor under `path`, as `Checkpoint.dense_state` gives them; on the device where it was read ahead."""
        if self._thread is None:
            return self.checkpoint.dense_state(path)
        reading, self._reading = self._reading, None
        if reading is None or reading[0] != path:
            reading = path, self._start(path)
        found = reading[1].result()
        if path in self._after:
            following = self._after[path]
            self._reading = following, self._start(following)
        return found

    def _start(self, path: str) -> Future[State]:
        assert self._thread is not None
        return self._thread.submit(self._read, path, torch.cuda.current_stream(self.device))

    def _read(self, path: str, user: torch.cuda.Stream) -> State:
        state = self.checkpoint.dense_state(path)
        assert self._stream is not None
        with torch.cuda.stream(self._stream):
            moved = {
                name: tensor.to(self.device, self.dtype if tensor.is_floating_point() else tensor.dtype)
                for name, tensor in state.items()
            }
        self._stream.synchronize()
        for tensor in moved.values():
            # Its memory was taken for this stream; it is not to be used again before the other one is done with it.
            tensor.record_stream(user)
        return moved


class WriteBehind:
    """One piece of writing at a time, beside a GPU's work. What failed is raised by the next call, or at the end."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="write behind") if device.type == "cuda" else None
        self._stream = _stream(device)
        self._writing: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            if self._thread:
                self._thread.shutdown()

    def do(self, write: Callable[[], None]) -> None:
        """Wait for the writing before, then start this one; on a CPU, write."""
        if self._thread is None:
            write()
            return
        self.wait()
        done: torch.cuda.Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record(torch.cuda.current_stream(self._device))
        self._writing = self._thread.submit(self._write, write, done)

    def _write(self, write: Callable[[], None], ready: torch.cuda.Event) -> None:
        """Copies to the host wait for what is to be written, and for nothing that was asked for later."""
        assert self._stream is not None
        self._stream.wait_event(ready)
        with torch.cuda.stream(self._stream):
            write()

    def wait(self) -> None:
        """Until nothing is being written."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()


def _stream(device: torch.device) -> torch.cuda.Stream | None:
    return torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
