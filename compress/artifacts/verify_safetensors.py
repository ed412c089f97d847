"""A safetensors file of an artifact: just far enough to trust it, and whether its numbers are numbers.

    [8 bytes: length n, little endian] [n bytes: JSON header] [tensor bytes]
    header: {"name": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}, ..., "__metadata__": {...}}

An IEEE-like number is NaN or infinite when all bits of its exponent are set, so one mask on the raw bits finds both
without decoding; float8 e4m3 keeps only the patterns with all bits set for NaN, and e8m0 only 0xFF. The files are read
in pieces of 16 MiB, whatever the size of a tensor.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

PIECE_BYTES = 16 << 20
MOST_HEADER_BYTES = 100_000_000  # the limit of the reference implementation

_BITS: dict[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64,
    "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
_NON_FINITE: dict[str, tuple[str, int]] = {
    "F8_E4M3": ("<u1", 0x7F),
    "F8_E5M2": ("<u1", 0x7C),
    "F8_E8M0": ("<u1", 0xFF),
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
    "F32": ("<u4", 0x7F80_0000),
    "C64": ("<u4", 0x7F80_0000),
    "F64": ("<u8", 0x7FF0_0000_0000_0000),
}
"""dtype -> (numpy dtype of the raw bits, the bits that are all set in NaN and infinity)."""


class BrokenSafetensors(ValueError):
    """The file is truncated or is no safetensors file. The message says how, without the path."""


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a header. `start` and `end` are bytes from the beginning of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(path: Path) -> list[TensorEntry]:
    """The tensors of one file in the order of their bytes.

    Raises BrokenSafetensors when the length, the header, an offset, a shape or the size of the file do not agree.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        if size < 8:
            raise BrokenSafetensors(f"truncated: {size} bytes, not even the length of a header")
        length = int.from_bytes(stream.read(8), "little")
        if length > MOST_HEADER_BYTES:
            raise BrokenSafetensors(f"not a safetensors file: its header would take {length:,} bytes")
        if 8 + length > size:
            raise BrokenSafetensors(f"truncated: the header alone takes {8 + length:,} bytes and {size:,} are there")
        try:
            header = json.loads(stream.read(length))
        except (ValueError, RecursionError) as error:
            raise BrokenSafetensors(f"the header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise BrokenSafetensors("the header is not a JSON object")
    tensors = sorted(
        (_entry(name, item, 8 + length) for name, item in header.items() if name != "__metadata__"),
        key=lambda tensor: (tensor.start, tensor.end),
    )
    _check_extent(tensors, 8 + length, size)
    return tensors


def _entry(name: str, item: Any, base: int) -> TensorEntry:
    try:
        dtype, shape, (start, end) = item["dtype"], tuple(item["shape"]), item["data_offsets"]
        bits = _BITS.get(dtype)
        sound = all(type(value) is int and value >= 0 for value in (*shape, start, end)) and start <= end
    except (KeyError, TypeError, ValueError) as error:
        raise BrokenSafetensors(f"{name}: the header says {item!r:.100}") from error
    if not sound:
        raise BrokenSafetensors(f"{name}: shape {shape} and offsets {start}, {end} are not sizes")
    if bits is None:
        raise BrokenSafetensors(f"{name}: dtype {dtype} is not known here, so its values cannot be checked")
    if math.prod(shape) * bits != (end - start) * 8:
        raise BrokenSafetensors(f"{name}: {dtype} of shape {shape} does not take {end - start:,} bytes")
    return TensorEntry(name, dtype, shape, base + start, base + end)


def _check_extent(tensors: list[TensorEntry], base: int, size: int) -> None:
    for before, after in pairwise(tensors):
        if before.end != after.start:
            raise BrokenSafetensors(f"{before.name} and {after.name} overlap, or leave a gap")
    if tensors and tensors[0].start != base:
        raise BrokenSafetensors(f"a gap before {tensors[0].name}")
    end = tensors[-1].end if tensors else base
    if size < end:
        raise BrokenSafetensors(f"truncated: the header promises {end:,} bytes and {size:,} are there")
    if size > end:
        raise BrokenSafetensors(f"{size - end:,} bytes after the last tensor")


def non_finite_counts(path: Path, tensors: list[TensorEntry]) -> dict[str, int]:
    """How many values are NaN or infinite, by tensor; tensors without any are left out."""
    counts: dict[str, int] = {}
    with path.open("rb", buffering=0) as stream:
        for tensor in tensors:
            if tensor.dtype in _NON_FINITE and (count := _count(stream, tensor)):
                counts[tensor.name] = count
    return counts


def _count(stream: BinaryIO | Any, tensor: TensorEntry) -> int:
    import numpy as np  # here, so that `compress --help` does not pay for it

    raw, mask = _NON_FINITE[tensor.dtype]
    bits = np.dtype(raw).type(mask)
    return sum(
        int(np.count_nonzero((np.frombuffer(piece, dtype=raw) & bits) == bits))
        for piece in _pieces(stream, tensor.start, tensor.end)
    )


def _pieces(stream: BinaryIO | Any, start: int, end: int) -> Iterator[bytes]:
    stream.seek(start, os.SEEK_SET)
    left = end - start
    while left:
        # One read may return less than asked for; a piece must hold whole values.
        piece = b""
        while len(piece) < min(PIECE_BYTES, left):
            more = stream.read(min(PIECE_BYTES, left) - len(piece))
            if not more:
                raise BrokenSafetensors("the file shrank while it was read")
            piece += more
        left -= len(piece)
        yield piece
