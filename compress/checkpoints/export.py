"""Formats an artifact can have. Adding one is an entry in `FORMATS` and the functions it names.

compressed-tensors   packed integer weights; loads in transformers and vLLM
plain                dense 16-bit safetensors carrying the quantised values: any loader, no memory saved
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from compress.checkpoints import compressed_tensors
from compress.checkpoints.reader import Checkpoint, tokenizer_files
from compress.checkpoints.stream import Entry, write_sharded
from compress.errors import RecipeError
from compress.files import write_json
from compress.quantization.scheme import Scheme

FormatName = Literal["compressed-tensors", "plain"]


@dataclass(frozen=True)
class Format:
    """What a format can hold, and how it is described to users."""

    name: FormatName
    description: str
    packs: bool
    """Whether quantised linears stay packed."""
    transposed_linears: bool
    """Whether GPT-2's Conv1D can be quantised in it."""


FORMATS: dict[str, Format] = {
    "compressed-tensors": Format(
        "compressed-tensors",
        "pack-quantized integers, 2-8 bits, per-module mixes; loads in transformers and vLLM",
        packs=True,
        transposed_linears=False,
    ),
    "plain": Format(
        "plain",
        "dense safetensors with the quantised values written out; loads anywhere, saves no memory",
        packs=False,
        transposed_linears=True,
    ),
}


def export(source: Checkpoint, folder: Path, format_name: FormatName, dtype: torch.dtype, shard_bytes: int) -> int:
    """Write `source` (a working or plain checkpoint) as a public model folder. Returns tensor bytes.

    Floating tensors outside quantised linears are cast to `dtype`; a value that does not fit raises RecipeError.
    """
    format_ = FORMATS[format_name]
    folder.mkdir(parents=True, exist_ok=True)
    total = write_sharded(folder, _entries(source, format_, dtype), shard_bytes)
    config = dict(source.config)
    config.pop("torch_dtype", None)
    config.pop("quantization_config", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    if format_.packs and source.schemes:
        config["quantization_config"] = compressed_tensors.quantization_config(source.schemes, _dense_linears(source))
    write_json(folder / "config.json", config)
    for path in tokenizer_files(source.folder):
        shutil.copyfile(path, folder / path.name)
    return total


def _entries(source: Checkpoint, format_: Format, dtype: torch.dtype) -> Iterator[Entry]:
    done: set[str] = set()
    for name in source.names:
        module, _, leaf = name.rpartition(".")
        if module in source.schemes and leaf != "bias":
            if module not in done:
                done.add(module)
                yield from _quantised(source, module, format_, dtype)
            continue
        yield _dense(source, name, dtype)


def _quantised(source: Checkpoint, module: str, format_: Format, dtype: torch.dtype) -> list[Entry]:
    scheme: Scheme = source.schemes[module]
    if format_.packs:
        return compressed_tensors.entries_of(module, scheme, source, dtype)
    shape = source.header(f"{module}.codes")[1]
    own = shape[::-1] if source.architecture.transposed_linears else shape
    return [Entry(f"{module}.weight", dtype, own, lambda: source.dense(module))]


def _dense(source: Checkpoint, name: str, dtype: torch.dtype) -> Entry:
    stored, shape = source.header(name)
    if stored not in ("F64", "F32", "F16", "BF16"):
        sample = source.read(name)
        return Entry(name, sample.dtype, shape, lambda: source.read(name))

    def load() -> torch.Tensor:
        tensor = source.read(name)
        cast = tensor.to(dtype)
        if not bool(torch.isfinite(cast).all()) and bool(torch.isfinite(tensor).all()):
            raise RecipeError(
                f"export.dtype: {name} holds values up to {float(tensor.abs().max()):.3g}, outside the range of "
                f"{str(dtype).removeprefix('torch.')}. Use export.dtype: bfloat16."
            )
        return cast

    return Entry(name, dtype, shape, load)


def _dense_linears(source: Checkpoint) -> list[str]:
    """nn.Linear modules that stay dense: unquantised ones in blocks, and the head."""
    arch = source.architecture
    count = max((arch.block_index(name) or 0) for name in source.names) + 1
    linears = [f"{arch.block_name(index)}.{name}" for index in range(count) for name in arch.linears]
    return [arch.head, *(name for name in linears if name not in source.schemes)]


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
