"""Measured memory: anonymous resident host memory (RssAnon) of this process, and device memory.

RssAnon leaves out files mapped into memory (safetensors being read), which the kernel can drop at will; it is what
counts against a container's limit once files are clean. A thread samples it a few hundred times a minute and keeps
the peak of each phase.
"""

from __future__ import annotations

import ctypes
import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    import torch


def rss_anon() -> int:
    """Anonymous resident bytes of this process; plain resident bytes where the kernel does not tell them apart."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return int(psutil.Process().memory_info().rss)


def available_bytes(control_group: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that can still be allocated: what the machine has, or less where a container's limit (cgroup v2) is lower.
    Files in the page cache count against such a limit, but the kernel drops them first."""
    free = int(psutil.virtual_memory().available)
    try:
        limit = int((control_group / "memory.max").read_text(encoding="ascii"))
        used = int((control_group / "memory.current").read_text(encoding="ascii"))
        lines = (control_group / "memory.stat").read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):  # no such files, or the limit is "max"
        return free
    stat = {name: int(value) for name, value in (line.split() for line in lines)}
    files = stat.get("inactive_file", 0) + stat.get("active_file", 0)
    return max(0, min(free, limit - used + files))


def release() -> None:
    """Give freed memory back to the system: collect cycles, and trim the C allocator where that is glibc.

    Tensors of a few megabytes come from the heap, which keeps what was freed; without trimming every phase of a run
    would start from the peak of the one before.
    """
    gc.collect()
    trim()


def release_device() -> None:
    """Give back what torch keeps of a GPU's memory, so that `free_bytes` sees it; between phases, since it is slow."""
    import torch

    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()


@contextmanager
def settled() -> Iterator[None]:
    """Leave what is there already out of the collections inside: looking through torch's and transformers' objects
    takes 0.2 s each time, and `release` collects after every block."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def trim() -> None:
    """Give back what the C allocator keeps of freed memory, where it is glibc; cheap enough for every block."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def large_tensors_from_system() -> None:
    """Take tensors of 8 MiB and more straight from the system, and return them at once when freed; smaller ones come
    from the heap, which `trim` gives back.

    glibc raises its threshold for that to 32 MiB as a program goes, and large freed tensors then stay in a fragmented
    heap. A threshold as low as a megabyte keeps least, but the system fills every page with zeros before it hands it
    out: with the batches of the CPU, 28 % of a GPTQ stage went there (docs/performance.md).

    Once that threshold is set, glibc gives the heap's end back whenever 128 KiB of it are free, between one temporary
    tensor and the next: it may keep 32 MiB, until `trim`.
    """
    m_mmap_threshold, m_trim_threshold = -3, -1  # from malloc.h
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(m_mmap_threshold, 8 << 20)
        libc.mallopt(m_trim_threshold, 32 << 20)


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be taken on a device: free memory of a GPU, available host memory otherwise."""
    import torch

    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else available_bytes()


BETWEEN = "between phases"
"""What is sampled outside of any."""


class PeakSampler:
    """Samples RssAnon in a thread; `phase(name)` names what is going on. Peaks in bytes, by phase, in `peaks`.

    `device_peaks` are those of the tensors on the current CUDA device, which torch counts itself; empty without one.
    """

    def __init__(self, interval: float = 0.05) -> None:
        self.peaks: dict[str, int] = {}
        self.device_peaks: dict[str, int] = {}
        self._phase = BETWEEN
        self._lock = threading.Lock()
        self._interval = interval
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="memory sampler", daemon=True)

    @property
    def peak(self) -> int:
        return max(self.peaks.values(), default=0)

    @property
    def current_peak(self) -> int:
        """Peak of the phase that is going on."""
        self._sample()
        return self.peaks[self._phase]

    def __enter__(self) -> PeakSampler:
        self._sample()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        trim()
        self._count_device()
        release_device()
        before, self._phase = self._phase, name
        try:
            yield
        finally:
            self._sample()
            self._count_device()
            # What the phase leaves behind is its own until it is given back: collecting takes longer than one interval.
            release()
            self._phase = before

    @property
    def device_peak(self) -> int | None:
        """Peak bytes of tensors on the current CUDA device so far; None without one."""
        self._count_device()
        return max(self.device_peaks.values(), default=None)

    def _count_device(self) -> None:
        """Give what torch counted since the last call to the phase that is going on, and let it count anew."""
        import torch

        # Not where nothing has used the GPU: asking would make a context on it.
        if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            peak = int(torch.cuda.max_memory_allocated())
            self.device_peaks[self._phase] = max(self.device_peaks.get(self._phase, 0), peak)
            torch.cuda.reset_peak_memory_stats()

    def _loop(self) -> None:
        while not self._stop.wait(self._interval):
            self._sample()

    def _sample(self) -> None:
        phase = self._phase  # that may have changed by the time the bytes are read
        found = rss_anon()
        with self._lock:
            self.peaks[phase] = max(self.peaks.get(phase, 0), found)
