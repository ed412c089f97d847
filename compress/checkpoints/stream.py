"""A safetensors writer that holds two tensors at a time, one on its way to disk and the next, however large a shard is.

The format (https://huggingface.co/docs/safetensors): 8 bytes little-endian header length, a JSON header giving each
tensor's dtype, shape and byte range, then the bytes. The header needs only shapes, which are known before the data.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from compress.files import atomic_path, write_json

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Entry:
    """A tensor that will be written: its name, dtype and shape now, its data when asked."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    load: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        return int(torch.Size(self.shape).numel()) * self.dtype.itemsize


def write_safetensors(path: Path, entries: Iterable[Entry], metadata: dict[str, str] | None = None) -> None:
    """Write one file, tensor by tensor, in the given order; atomically."""
    entries = list(entries)
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offset = 0
    for entry in entries:
        header[entry.name] = {
            "dtype": DTYPE_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.bytes],
        }
        offset += entry.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for tensor in _loaded(entries):
            if tensor.numel():
                # Not view(-1): a single element counts as contiguous whatever its stride, and then has no bytes view.
                file.write(tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy().data)


def _loaded(entries: list[Entry]) -> Iterator[Tensor]:
    """The tensors of all entries, contiguous and on the host. The next is made while the caller has the last."""
    with ThreadPoolExecutor(1) as ahead:
        waiting: deque[Future[Tensor]] = deque()
        for entry in entries:
            waiting.append(ahead.submit(_load, entry))
            if len(waiting) > 1:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _load(entry: Entry) -> Tensor:
    tensor = entry.load().detach().to("cpu", entry.dtype).contiguous()
    if tuple(tensor.shape) != entry.shape:
        raise AssertionError(f"{entry.name}: promised shape {entry.shape}, got {tuple(tensor.shape)}")
    return tensor


def write_sharded(folder: Path, entries: Iterable[Entry], max_shard_bytes: int = 5 * 10**9) -> int:
    """Write model.safetensors, or shards with an index when they outgrow `max_shard_bytes`. Returns tensor bytes."""
    shards: list[list[Entry]] = [[]]
    filled = total = 0
    for entry in entries:
        if shards[-1] and filled + entry.bytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += entry.bytes
        total += entry.bytes
    if len(shards) == 1:
        write_safetensors(folder / "model.safetensors", shards[0])
        return total
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / name, shard)
        weight_map.update({entry.name: name for entry in shard})
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)
    return total
