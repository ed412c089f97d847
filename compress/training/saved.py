"""What a killed training run goes on from: tensors and facts in one file, so that they cannot disagree."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from compress.checkpoints.stream import Entry, write_safetensors

_FACTS = "compress.training"


def save(path: Path, tensors: Mapping[str, Tensor], facts: dict[str, Any]) -> None:
    """Write tensors, and JSON facts as the file's metadata; the file is whole or absent, even after a kill. Tensors are
    written one by one: the state of all weights is gigabytes, and is not copied."""
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = [_entry(name, tensor) for name, tensor in tensors.items()]
    write_safetensors(path, entries, {_FACTS: json.dumps(facts)})


def _entry(name: str, tensor: Tensor) -> Entry:
    return Entry(name, tensor.dtype, tuple(tensor.shape), lambda: tensor)


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """What `save` wrote, or None if there is nothing."""
    if not path.is_file():
        return None
    with safe_open(path, framework="pt") as file:
        facts: dict[str, Any] = json.loads(file.metadata()[_FACTS])
        return {name: file.get_tensor(name) for name in file.keys()}, facts  # noqa: SIM118 (not a mapping)
