"""GGUF, the single file of llama.cpp: our codes as they are, in the block types whose grids agree with ours.

A type keeps blocks of 32 weights of a row with a float16 scale d (and a minimum m). A group of ours that is a multiple
of 32 columns is as many blocks with the same d, and nothing is rounded again:

    Q4_0   d, 16 bytes                value (q - 8) d      symmetric, up to 4 bits: 2- and 3-bit codes take 4 here
    Q5_0   d, 4 + 16 bytes            value (q - 16) d     symmetric, 5 bits
    Q8_0   d, 32 bytes                value q d            symmetric, 6 and 8 bits
    Q4_1   d, m, 16 bytes             value q d + m        asymmetric, up to 4 bits; m = -zero d, rounded to float16, or
                                                          with free minima as it was found
    Q5_1   d, m, 4 + 16 bytes         value q d + m        asymmetric, 5 bits

    Q2_K to Q6_K           K-quants, of stages that solve on their grids (`quantization.super_blocks`)

Fewer bits than the type has cost the difference; K-quants fit, with `k_quant: true` in the stage that quantises.

Norms and biases are float32, as llama.cpp computes with them; what else is not quantised is in the stored dtype. Beside
the file lie config.json and the tokenizer's files, which transformers wants; the weights are in it alone.
Sources: ggml-common.h and ggml-quants.c of llama.cpp, the GGUF specification of ggml. tests/checkpoints/test_gguf.py
reads what is written with the gguf package's and transformers' readers.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compress.architecture import Architecture
from compress.checkpoints.folder import tokenizer_files
from compress.checkpoints.formats.base import Format, Shapes, Written, cast
from compress.checkpoints.formats.gguf_k_quants import super_blocks
from compress.checkpoints.formats.gguf_names import Names, completed, metadata, refusals, unsupported
from compress.checkpoints.formats.gguf_rope import tensors_of
from compress.checkpoints.formats.gguf_tokenizer import Vocabulary, vocabulary_of
from compress.checkpoints.reader import Checkpoint, is_float
from compress.errors import RecipeError
from compress.events import Event
from compress.files import atomic_path, write_json
from compress.quantization.grid import Grid
from compress.quantization.scheme import Scheme
from compress.quantization.super_blocks import K_QUANTS, SUPER, SuperBlocks

BLOCK = 32
FILE = "model.gguf"
ROUNDING = 2.0**-10
"""What a float16 may be off by, relative, in its normal range."""
COARSE = 2.0**-5
"""The same of a super-block's scale, whose groups' integers make up for less."""
BLOCK_BYTES = {"Q4_0": 18, "Q4_1": 20, "Q5_0": 22, "Q5_1": 24, "Q8_0": 34}
SUPER_BYTES = {layout.name: layout.bytes for layout in K_QUANTS.values()}


def type_of(scheme: Scheme) -> str | None:
    """The block type that holds a scheme's codes, or None."""
    if scheme.grid != "int" or scheme.inputs:
        return None
    if scheme.k_quant:
        return scheme.k_quant.name
    if scheme.bits <= 4:
        return "Q4_0" if scheme.symmetric else "Q4_1"
    if scheme.bits == 5:
        return "Q5_0" if scheme.symmetric else "Q5_1"
    return "Q8_0" if scheme.symmetric else None


class Gguf(Format):
    """One file with tokenizer and chat template, for llama.cpp and what is built on it."""

    name = "gguf"
    description = (
        "one .gguf file for llama.cpp, from the same codes: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, K-quants, mixes of them"
    )
    packs = True
    vocabulary = "any"
    fuses = False

    def refusal(self, scheme: Scheme, rows: int, columns: int) -> str | None:
        if type_of(scheme) is None:
            return "no block type has such a grid: take weights alone, and at most 5 bits where asymmetric"
        if scheme.k_quant:
            return None if scheme.divides(columns) else f"its super-blocks are {SUPER} columns wide, of {columns} here"
        if scheme.width(columns) % BLOCK:
            return f"its blocks are {BLOCK} columns wide, and groups of {scheme.width(columns)} do not divide into them"
        return None

    def refuses(self, schemes: Mapping[str, Scheme], shapes: Shapes, architecture: Architecture) -> list[str]:
        reason = unsupported(architecture.model_type)
        return [f"{self.name}: {reason}"] if reason else []

    def refuses_config(self, config: Mapping[str, Any]) -> list[str]:
        if unsupported(str(config.get("model_type"))):
            return []  # `refuses` says it.
        return [f"{self.name}: {reason}" for reason in refusals(completed(config))]

    def stored_bytes(self, scheme: Scheme, rows: int, columns: int, dtype_bytes: int) -> int:
        return rows * _row_bytes(str(type_of(scheme)), columns)

    def other_bytes(self, shape: tuple[int, ...], dtype_bytes: int) -> int:
        return math.prod(shape) * (4 if len(shape) == 1 else dtype_bytes)

    def added_bytes(self, config: Mapping[str, Any]) -> int:
        return sum(4 * factors.numel() for factors in tensors_of(completed(config)).values())

    def reading_bytes(self, parameters: int) -> int:
        return 4 * parameters  # transformers' reader gives float32

    def write(self, source: Checkpoint, folder: Path, dtype: torch.dtype, shard_bytes: int) -> Written:
        del shard_bytes  # One file whatever its size: llama.cpp maps it into memory.
        # `plan` saw a config with as many blocks; which ones went is known now, and layers may differ.
        if refused := self.refuses_config(source.config):
            raise RecipeError([f"export.format: {each}. Take another format: the stages are kept" for each in refused])
        folder.mkdir(parents=True, exist_ok=True)
        vocabulary = vocabulary_of(source.folder, int(source.config["vocab_size"]))
        rounded: dict[str, float] = {}
        tensors = _tensors(source, dtype, rounded)
        with atomic_path(folder / FILE) as temporary:
            _write_file(temporary, metadata(completed(source.config)), vocabulary, tensors)
        config = {key: value for key, value in source.config.items() if key not in ("torch_dtype", "dtype")}
        config.pop("quantization_config", None)
        write_json(folder / "config.json", {**config, "dtype": str(dtype).removeprefix("torch.")})
        for path in tokenizer_files(source.folder):
            shutil.copyfile(path, folder / path.name)
        left_out = vocabulary.left_out
        events = [Event("tokenizer_left_out", FILE, left_out)] if left_out else []
        for module, error in sorted(rounded.items()):
            message = f"scales are below float16's normal range: up to {100 * error:.2g} % off as they are stored here"
            events.append(Event("scales_rounded", module, message, {"relative_error": error}))
        return Written(sum(tensor.bytes for tensor in tensors), tuple(events))


def tensor_bytes(path: Path) -> int:
    """Bytes of all tensors of a file."""
    import gguf

    return sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(str(path)).tensors)


def effective_bits(path: Path) -> float | None:
    """8 x bytes of a file's quantised matrices / their weights, the embedding left out; None where none is."""
    import gguf

    matrices = [tensor for tensor in gguf.GGUFReader(str(path)).tensors if tensor.name.startswith("blk.")]
    packed = [tensor for tensor in matrices if tensor.tensor_type.name not in ("F32", "F16", "BF16")]
    weights = sum(int(tensor.n_elements) for tensor in packed)
    return 8 * sum(int(tensor.n_bytes) for tensor in packed) / weights if packed else None


@dataclass(frozen=True)
class Stored:
    """A tensor of the file: ggml's type, and its bytes when asked for, as uint8 or a float array, rows first."""

    name: str
    kind: str
    shape: tuple[int, ...]
    """Of the array that `load` gives: for block types (rows, bytes of a row)."""
    load: Any

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * {"F32": 4, "F16": 2, "BF16": 2}.get(self.kind, 1)


def _tensors(source: Checkpoint, dtype: torch.dtype, rounded: dict[str, float]) -> list[Stored]:
    """Every tensor; modules whose scales lose more than float16's rounding go into `rounded` when they are loaded."""
    config = completed(source.config)
    names = Names(config)
    found, done = [], set()
    for name in source.names:
        module = source.quantised_owner(name)
        if module is None:
            found.append(_dense(source, names, name, dtype))
        elif module not in done:
            done.add(module)
            found.append(_blocks(source, names, module, rounded))
    for name, factors in tensors_of(config).items():
        found.append(Stored(name, "F32", tuple(factors.shape), factors.numpy))
    return found


def _dense(source: Checkpoint, names: Names, name: str, dtype: torch.dtype) -> Stored:
    stored, shape = source.header(name)
    if not is_float(stored):
        raise RecipeError(f"export.format: gguf cannot hold {name}, which is neither a weight nor a bias ({stored})")
    kept = torch.float32 if len(shape) == 1 else dtype
    kind = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[kept]

    def load() -> Any:
        value = cast(names.written(name, source.read(name)), kept, name).contiguous()
        return value.view(torch.int16).numpy() if kept is torch.bfloat16 else value.numpy()

    return Stored(names.of(name), kind, tuple(shape), load)


def _blocks(source: Checkpoint, names: Names, module: str, rounded: dict[str, float]) -> Stored:
    scheme = source.schemes[module]
    rows, columns = source.matrix_shape(module)
    kind = str(type_of(scheme))

    def load() -> Any:
        codes, grid = source.codes(module)
        order = names.order(f"{module}.weight", rows)
        if isinstance(grid.nested, SuperBlocks):
            # Found as they are stored; but where they are few of the smallest steps, there was little to find.
            error = float((2.0**-25 / grid.nested.scale.float().abs()).max())
        else:
            halved = grid.scale.half().float()
            error = float(((halved - grid.scale.float()).abs() / grid.scale.float().abs()).max())
        if error > (COARSE if scheme.k_quant else ROUNDING):
            rounded[module] = error
        if scheme.k_quant:
            assert isinstance(grid.nested, SuperBlocks)
            for part in (grid.nested.scale, grid.nested.minimum):
                if part is not None:
                    _in_range(part, module)
            return super_blocks(codes[order], grid.at(order)).numpy()
        return blocks(codes[order], grid.at(order), kind, module).numpy()

    return Stored(names.of(f"{module}.weight"), kind, (rows, _row_bytes(kind, columns)), load)


def _row_bytes(kind: str, columns: int) -> int:
    """Bytes of a row in a block type."""
    return columns // SUPER * SUPER_BYTES[kind] if kind in SUPER_BYTES else columns // BLOCK * BLOCK_BYTES[kind]


def blocks(codes: Tensor, grid: Grid, kind: str, module: str) -> Tensor:
    """Bytes uint8 (rows, bytes of a row) of codes int8 (rows, columns) on their grid, in a block type.

    Raises RecipeError where a scale or a minimum leaves float16's range.
    """
    scheme = grid.scheme
    rows, columns = codes.shape
    repeats = scheme.width(columns) // BLOCK
    scale = grid.scale.repeat_interleave(repeats, dim=1).view(-1, 1)
    offset = {"Q4_0": 8, "Q5_0": 16, "Q8_0": 0}.get(kind, 1 << (scheme.bits - 1))
    values = codes.view(-1, BLOCK).to(torch.int16) + offset
    parts = [_half(scale, module)]
    if kind in ("Q4_1", "Q5_1"):
        assert grid.zero is not None
        if isinstance(grid.nested, SuperBlocks) and grid.nested.minimum is not None:
            minimum = grid.nested.minimum.float()
        else:
            minimum = (grid.zero.float() + offset) * grid.scale.float()
        parts.append(_half(-minimum.repeat_interleave(repeats, dim=1).view(-1, 1), module))
    if kind == "Q8_0":
        parts.append(values.to(torch.int8).view(torch.uint8))
    else:
        if kind in ("Q5_0", "Q5_1"):
            fifth = ((values >> 4) & 1).view(-1, 4, 8) << torch.arange(8)
            parts.append(fifth.sum(-1).to(torch.uint8))
        low = values & 15
        parts.append((low[:, :16] | low[:, 16:] << 4).to(torch.uint8))
    return torch.cat(parts, dim=1).view(rows, -1)


def _half(values: Tensor, module: str) -> Tensor:
    """float16 bytes (n, 2) of values (n, 1)."""
    return _in_range(values, module).view(torch.uint8)


def _in_range(values: Tensor, module: str) -> Tensor:
    """In float16. At the very end of its range a scale was held back there, and the weight with it: refused."""
    halved = values.to(torch.float16)
    if bool((halved.abs() >= torch.finfo(torch.float16).max).any()) and bool(torch.isfinite(values).all()):
        raise RecipeError(
            f"export.format: {module} has scales up to {float(values.abs().max()):.3g} or more, outside the float16 "
            "that gguf keeps them in. Use format: compressed-tensors with export.dtype: bfloat16."
        )
    return halved


def _write_file(path: Path, keys: list[tuple[str, Any, str]], vocabulary: Vocabulary, tensors: list[Stored]) -> None:
    """One tensor in memory at a time."""
    import gguf

    (_, architecture, _), *others = keys
    writer = gguf.GGUFWriter(None, architecture)
    for key, value, kind in others:
        getattr(writer, f"add_{kind}")(key, value)
    vocabulary.add_to(writer)
    for tensor in tensors:
        # Of block types the package wants to know the bytes of a row.
        dtype = {"F32": np.float32, "F16": np.float16, "BF16": np.int16}.get(tensor.kind, np.uint8)
        kind = gguf.GGMLQuantizationType[tensor.kind]
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(dtype), tensor.bytes, kind)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(tensor.load())
    writer.close()
