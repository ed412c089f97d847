"""A .gguf file of an artifact: that it can be read to its end, and that what is floating in it is finite.

Blocks of integers have a float16 scale, and in some types a second one (`checkpoints.formats`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

BLOCKS = {
    **{"Q4_0": (18, 0, 1), "Q4_1": (20, 0, 2), "Q5_0": (22, 0, 1), "Q5_1": (24, 0, 2), "Q8_0": (34, 0, 1)},
    **{"Q2_K": (84, 80, 2), "Q3_K": (110, 108, 1), "Q4_K": (144, 0, 2), "Q5_K": (176, 0, 2), "Q6_K": (210, 208, 1)},
}
"""Bytes of a block, at which of them its float16s begin, and how many they are."""


def scan(path: Path, name: str) -> tuple[int, list[str]]:
    """The number of tensors, and problems, each naming the file by `name`."""
    from gguf import GGUFReader

    try:
        tensors = GGUFReader(str(path)).tensors
    except (OSError, ValueError, KeyError, IndexError) as error:
        return 0, [f"{name}: cannot be read as GGUF ({error})"]
    problems = []
    for tensor in tensors:
        count = _non_finite(tensor)
        if count is None:
            problems.append(f"{name}: {tensor.name}: type {tensor.tensor_type.name} is not checked here")
        elif count:
            problems.append(f"{name}: {tensor.name}: {count:,} values are NaN or infinite")
    return len(tensors), problems


def _non_finite(tensor: Any) -> int | None:
    """Floating values of a tensor, or of its blocks' scales, that are not finite; None for a type that is not known."""
    import numpy as np

    kind, data = tensor.tensor_type.name, tensor.data
    if kind in ("F32", "F16"):
        return int(np.count_nonzero(~np.isfinite(data)))
    if kind == "BF16":
        return int(np.count_nonzero((data.view(np.uint16) & 0x7F80) == 0x7F80))
    if kind not in BLOCKS:
        return None
    size, start, halves = BLOCKS[kind]
    scales = np.ascontiguousarray(data.reshape(-1, size)[:, start : start + 2 * halves]).view(np.float16)
    return int(np.count_nonzero(~np.isfinite(scales)))
