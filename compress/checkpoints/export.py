"""A finished checkpoint as public files: `formats` has one entry for each layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from compress.checkpoints.formats import FORMATS, FormatName, Written
from compress.checkpoints.formats.fusing import events_of_fusing
from compress.checkpoints.reader import Checkpoint


def export(source: Checkpoint, folder: Path, format_name: FormatName, dtype: torch.dtype, shard_bytes: int) -> Written:
    """Write `source` (a working, plain or packed checkpoint) as a public model folder.

    Floating tensors outside quantised linears are cast to `dtype`; a value that does not fit raises RecipeError.
    """
    format_ = FORMATS[format_name]
    written = format_.write(source, folder, dtype, shard_bytes)
    apart = events_of_fusing(source) if format_.fuses and source.schemes else []
    return replace(written, events=(*written.events, *apart))


def stored_dtype(config: dict[str, Any], asked: str, float16_safe: bool) -> torch.dtype:
    """The 16-bit dtype an artifact is stored in.

    `auto` keeps a 16-bit source's dtype; a float32 source becomes float16 (three more bits of scale than bfloat16),
    or bfloat16 where the architecture's activations are known to leave float16's range.
    """
    named = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
    if asked != "auto":
        return named[asked]
    declared = named.get(str(config.get("dtype") or config.get("torch_dtype") or "float32"), torch.float32)
    if declared is not torch.float32:
        return declared
    return torch.float16 if float16_safe else torch.bfloat16
