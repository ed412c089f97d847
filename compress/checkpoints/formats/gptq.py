"""The layout that AutoGPTQ made a standard: what GPTQModel, optimum, transformers and vLLM load as `gptq`.

Per linear with `rows` outputs and `columns` inputs, everything transposed:

    qweight  int32 (columns x b / 32, rows)   codes + 2^(b-1), value i at bits i x b of its output's stream of words
    scales   stored dtype (groups, rows)
    qzeros   int32 (groups, rows x b / 32)    zero points + 2^(b-1), packed along rows
    g_idx    int32 (columns,)                 the group of each column: i // group_size, columns are never reordered

Two conventions for `qzeros` exist. `checkpoint_format: gptq` (v1, AutoGPTQ's) stores each zero point less one, which
loaders add again; it is what symmetric schemes are written in, and every loader reads it: a zero point of 8 is stored
as 7. A zero point of 0 would be stored as -1, which loaders disagree about, so asymmetric schemes are written as
`gptq_v2`, where zero points are stored as they are; GPTQModel reads that, auto-gptq does not, and vLLM 0.32 takes no
asymmetric scheme in this layout.

config.json and quantize_config.json carry the same section. Sources: AutoGPTQ's qlinear modules, GPTQModel's
`convert_gptq_v1_to_v2_format`, vLLM's auto_gptq.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.architecture import Architecture
from compress.checkpoints.formats.base import Format, Shapes, Written, entries_of, servable_scale, write_folder
from compress.checkpoints.reader import Checkpoint
from compress.checkpoints.stream import Entry
from compress.files import write_json
from compress.quantization.grid import Grid
from compress.quantization.scheme import Scheme

BITS = (2, 3, 4, 8)
WORD = 32
V1, V2 = "gptq", "gptq_v2"


class GptqLayout(Format):
    """One scheme for the whole model, integers packed along inputs."""

    name = "gptq"
    description = "AutoGPTQ's layout, one scheme of 2, 3, 4 or 8 bits; loads in GPTQModel, transformers and vLLM"
    packs = True
    loader_needs = ("optimum", "gptqmodel")

    def refusal(self, scheme: Scheme, rows: int, columns: int) -> str | None:
        if scheme.grid != "int" or scheme.inputs:
            return "its weights are integers, its inputs are not"
        if scheme.k_quant:
            return "its scales are floating point, not integers of a K-quant"
        if scheme.free_minima:
            return "its zero points are integers"
        if scheme.bits not in BITS:
            return f"its loaders know {', '.join(map(str, BITS))} bits"
        if columns % WORD or rows % WORD:
            return f"{rows} rows and {columns} columns must both divide by {WORD} for its loaders' kernels"
        return None

    def refuses(self, schemes: Mapping[str, Scheme], shapes: Shapes, architecture: Architecture) -> list[str]:
        found = []
        labels = sorted({scheme.label for scheme in schemes.values()})
        if len(labels) > 1:
            found.append(f"{self.name} has one scheme for the whole model, this one has {' and '.join(labels)}")
        if schemes and _uneven(schemes, shapes, architecture):
            found.append(
                f"{self.name} quantises the same linears in every block, this model leaves some of them in 16 bits"
            )
        return found

    def stored_bytes(self, scheme: Scheme, rows: int, columns: int, dtype_bytes: int) -> int:
        groups = scheme.groups(columns)
        packed = rows * columns * scheme.bits // 8
        return packed + groups * rows * dtype_bytes + groups * rows * scheme.bits // 8 + columns * 4

    def stays_packed(self, schemes: Iterable[Scheme]) -> bool:
        return True

    def write(self, source: Checkpoint, folder: Path, dtype: torch.dtype, shard_bytes: int) -> Written:
        def quantised(module: str, scheme: Scheme) -> list[Entry]:
            return _entries(module, scheme, source, dtype)

        section = quantization_config(source.schemes, source.architecture)
        if section:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / "quantize_config.json", section)
        entries = entries_of(source, dtype, quantised)
        return write_folder(source, folder, entries, dtype, shard_bytes, section, _older_names(source.config, dtype))


def _older_names(config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """What transformers before 5 reads from other keys: without them auto-gptq's takes a theta of 10000 for every
    model, and no error. Newer ones read both."""
    rope = config.get("rope_parameters") or {}
    older: dict[str, Any] = {"torch_dtype": str(dtype).removeprefix("torch.")}
    if "rope_theta" in rope and "rope_theta" not in config:
        older["rope_theta"] = rope["rope_theta"]
    if rope.get("rope_type", "default") != "default" and "rope_scaling" not in config:
        older["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    return older


def _uneven(schemes: Mapping[str, Scheme], shapes: Shapes, architecture: Architecture) -> bool:
    """Whether blocks differ in which linears are quantised."""
    kinds: dict[int, set[str]] = {}
    for module in shapes:
        index = architecture.block_index(module)
        if index is not None:  # embedding and head are refused elsewhere
            kinds.setdefault(index, set())
    for module in schemes:
        index = architecture.block_index(module)
        if index is not None:
            kinds[index].add(module.removeprefix(f"{architecture.blocks}.{index}."))
    return len({frozenset(kind) for kind in kinds.values()}) > 1


def _entries(module: str, scheme: Scheme, source: Checkpoint, dtype: torch.dtype) -> list[Entry]:
    rows, columns = source.matrix_shape(module)
    groups, bits, offset = scheme.groups(columns), scheme.bits, 1 << (scheme.bits - 1)

    def zeros() -> Tensor:
        zero = source.codes(module)[1].zero
        if zero is None:  # v1: the zero point of a symmetric grid, less one
            return torch.full((groups, rows), offset - 1)
        return zero.T.long() + offset

    return [
        Entry(
            f"{module}.qweight",
            torch.int32,
            (columns * bits // WORD, rows),
            lambda: pack(source.codes(module)[0].long() + offset, bits).T,
        ),
        Entry(f"{module}.qzeros", torch.int32, (groups, rows * bits // WORD), lambda: pack(zeros(), bits)),
        Entry(f"{module}.scales", dtype, (groups, rows), lambda: servable_scale(source, module).T),
        Entry(f"{module}.g_idx", torch.int32, (columns,), lambda: torch.arange(columns) // scheme.width(columns)),
    ]


def pack(values: Tensor, bits: int) -> Tensor:
    """int64 (m, n) of non-negative values below 2^bits -> int32 (m, n x bits / 32): a dense stream, low bits first."""
    stream = (values.unsqueeze(-1) >> torch.arange(bits)) & 1
    words = stream.reshape(values.shape[0], -1, WORD) << torch.arange(WORD)
    return _signed(words.sum(-1))


def unpack(words: Tensor, bits: int) -> Tensor:
    """int32 (m, k) -> int64 (m, k x 32 / bits): the inverse of `pack`."""
    stream = (words.long().unsqueeze(-1) >> torch.arange(WORD)) & 1
    return (stream.reshape(words.shape[0], -1, bits) << torch.arange(bits)).sum(-1)


def _signed(words: Tensor) -> Tensor:
    """Values below 2^32 as the int32 with the same bits."""
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def quantization_config(schemes: Mapping[str, Scheme], architecture: Architecture) -> dict[str, Any] | None:
    """The section of config.json, which is also quantize_config.json; None where nothing is quantised."""
    if not schemes:
        return None
    scheme = next(iter(schemes.values()))
    linears = {re.sub(rf"^{re.escape(architecture.blocks)}\.\d+\.", "", module) for module in schemes}
    kept = [name for name in architecture.linears if name not in linears]
    groups = [[name for name in group.linears if name in linears] for group in architecture.groups]
    return {
        "quant_method": "gptq",
        "checkpoint_format": V1 if scheme.symmetric else V2,
        "bits": scheme.bits,
        "group_size": scheme.group_size or -1,
        "sym": scheme.symmetric,
        "desc_act": False,
        "static_groups": True,
        "true_sequential": True,
        "lm_head": False,
        "pack_dtype": "int32",
        **({"modules_in_block_to_quantize": [group for group in groups if group]} if kept else {}),
        # GPTQModel's and vLLM's way to leave linears alone; `-:` takes a module out.
        **({"dynamic": {f"-:.*\\.{re.escape(name)}$": {} for name in kept}} if kept else {}),
        "meta": {"quantizer": [f"compress-models:{metadata.version('compress-models')}"]},
    }


# --- reading ---------------------------------------------------------------------------------------------------------


def understood(config: Mapping[str, Any], names: Iterable[str]) -> bool:
    """Whether linears are packed, columns in order: with `desc_act` they are not, and only a loader knows."""
    packed = any(name.endswith(".qweight") for name in names)
    return packed and not config.get("desc_act") and config.get("checkpoint_format", V1) in (V1, V2)


def schemes_in(checkpoint: Checkpoint) -> dict[str, Scheme]:
    """The one scheme, of every packed linear; asymmetric where zero points say so, whatever `sym` says."""
    config = checkpoint.config["quantization_config"]
    size = int(config["group_size"])
    bits, span = int(config["bits"]), None if size < 0 else size
    modules = [name.removesuffix(".qweight") for name in checkpoint.names if name.endswith(".qweight")]
    symmetric = {module: not bool(_zeros_of(checkpoint, module, bits).any()) for module in modules}
    return {module: Scheme(bits, symmetric[module], span) for module in modules}


def codes_of(checkpoint: Checkpoint, module: str, scheme: Scheme) -> tuple[Tensor, Grid]:
    """Codes int8 (rows, columns) and grid."""
    codes = unpack(checkpoint.read(f"{module}.qweight").T, scheme.bits) - (1 << (scheme.bits - 1))
    scale = checkpoint.read(f"{module}.scales").T.contiguous()
    zero = None if scheme.symmetric else _zeros_of(checkpoint, module, scheme.bits).to(torch.int8)
    return codes.to(torch.int8), Grid(scheme, scale, zero)


def _zeros_of(checkpoint: Checkpoint, module: str, bits: int) -> Tensor:
    """Zero points int64 (rows, groups) from the middle of the range: 0 everywhere in a symmetric linear."""
    stored = unpack(checkpoint.read(f"{module}.qzeros"), bits).T
    first = checkpoint.config["quantization_config"].get("checkpoint_format", V1) == V1
    zeros: Tensor = (stored + int(first)) % (1 << bits) - (1 << (bits - 1))
    return zeros
