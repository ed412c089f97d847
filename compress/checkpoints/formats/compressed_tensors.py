"""compressed-tensors: packed integers (`pack-quantized`), and int8 weights for int8 inputs (`int-quantized`).

Per linear, pack-quantized: <module>.weight_packed int32 (codes + 2^(b-1), packed densely along columns), weight_scale
(rows, groups), weight_shape int64 (2,), and for asymmetric schemes weight_zero_point int32 packed along rows.
int-quantized: <module>.weight int8 (rows, columns) and weight_scale (rows, 1). config.json carries
`quantization_config` with one config group a scheme. Packing is the library's own; an independent unpacker in
tests/checkpoints checks it.
Format: https://github.com/vllm-project/compressed-tensors
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from compress.architecture import Architecture
from compress.checkpoints.formats.base import (
    Format,
    Shapes,
    Written,
    dense_linears,
    entries_of,
    servable_scale,
    write_folder,
)
from compress.checkpoints.reader import Checkpoint
from compress.checkpoints.stream import Entry
from compress.quantization.grid import Grid
from compress.quantization.scheme import Scheme

_IN_BLOCK = re.compile(r"(.+?)\.(\d+)\.(.+)")
PACKED_ROWS = 256
"""Rows that are packed at a time, to stay in the cache."""
PACKED, INTEGERS, MIXED = "pack-quantized", "int-quantized", "mixed-precision"


class CompressedTensors(Format):
    """What vLLM and transformers both load, with a scheme for each linear if need be."""

    name = "compressed-tensors"
    description = "packed integers, 2-8 bits, per-module mixes, int8 inputs; loads in transformers and vLLM"
    packs = True
    vocabulary = "head"
    keeps_kv_scales = True

    def refusal(self, scheme: Scheme, rows: int, columns: int) -> str | None:
        if scheme.grid != "int":
            return "its weights are integers"
        if scheme.k_quant:
            return "its scales are floating point, not integers of a K-quant"
        if scheme.free_minima:
            return "its zero points are integers"
        if scheme.outliers:
            return "it cannot keep columns of outliers in 16 bits"
        if scheme.inputs and (scheme.bits != 8 or not scheme.symmetric or scheme.group_size is not None):
            return "int8 inputs go with int8 symmetric weights, one scale a row"
        return None

    def refuses(self, schemes: Mapping[str, Scheme], shapes: Shapes, architecture: Architecture) -> list[str]:
        if not cannot_load(set(schemes.values())):
            return []
        labels = ", ".join(sorted({scheme.label for scheme in schemes.values()}))
        return [
            f"transformers cannot load an asymmetric scheme beside another one from {self.name} ({labels}). Use one "
            "scheme for all modules, symmetric ones, or format: plain"
        ]

    def stored_bytes(self, scheme: Scheme, rows: int, columns: int, dtype_bytes: int) -> int:
        if scheme.inputs:
            return rows * columns + rows * dtype_bytes
        return scheme.stored_bytes(rows, columns, dtype_bytes)

    def stays_packed(self, schemes: Iterable[Scheme]) -> bool:
        return not unpacks_while_loading(list(set(schemes)))

    def write(self, source: Checkpoint, folder: Path, dtype: torch.dtype, shard_bytes: int) -> Written:
        def quantised(module: str, scheme: Scheme) -> list[Entry]:
            return _entries(module, scheme, source, dtype)

        cache = _cache_scheme(source)
        section = None
        if source.schemes or cache:
            section = {**quantization_config(source.schemes, dense_linears(source)), "kv_cache_scheme": cache}
        return write_folder(source, folder, entries_of(source, dtype, quantised), dtype, shard_bytes, section)


def _entries(module: str, scheme: Scheme, source: Checkpoint, scale_dtype: torch.dtype) -> list[Entry]:
    """The tensors of one quantised linear, packed when they are written."""
    rows, columns = source.matrix_shape(module)
    groups = scheme.groups(columns)
    scale = Entry(f"{module}.weight_scale", scale_dtype, (rows, groups), lambda: servable_scale(source, module))
    if scheme.inputs:
        return [Entry(f"{module}.weight", torch.int8, (rows, columns), lambda: source.codes(module)[0]), scale]
    entries = [
        Entry(
            f"{module}.weight_packed",
            torch.int32,
            (rows, math.ceil(columns * scheme.bits / 32)),
            lambda: packed(source.codes(module)[0], scheme.bits),
        ),
        scale,
        Entry(f"{module}.weight_shape", torch.int64, (2,), lambda: torch.tensor([rows, columns])),
    ]
    if not scheme.symmetric:
        shape = (math.ceil(rows * scheme.bits / 32), groups)
        entries.append(
            Entry(
                f"{module}.weight_zero_point",
                torch.int32,
                shape,
                lambda: packed(source.codes(module)[1].zero, scheme.bits, along=0),
            )
        )
    return entries


def packed(codes: Tensor | None, bits: int, along: Literal[0, 1] = 1) -> Tensor:
    """int32 words of codes int8 (rows, columns), densely along one dimension.

    The library's own packing, or where a byte holds a whole number of codes the same by bytes, in a fifth of the time.
    """
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    assert codes is not None, "symmetric schemes have no zero points to pack"
    each = 8 // bits
    if along == 0 or 8 % bits or codes.shape[1] % (32 // bits):
        return pack_to_int32(codes, bits, packed_dim=along)  # type: ignore[no-any-return]
    words = torch.empty(codes.shape[0], codes.shape[1] // each, dtype=torch.uint8)
    for start in range(0, len(codes), PACKED_ROWS):
        part = slice(start, start + PACKED_ROWS)
        # To unsigned by the library's offset; what does not fit a byte wraps around, as int8 did.
        unsigned = codes[part].view(torch.uint8).add(1 << (bits - 1)).bitwise_and_((1 << bits) - 1)
        parts = unsigned.view(len(unsigned), -1, each).unbind(-1)
        word = words[part].copy_(parts[0])
        for number, more in enumerate(parts[1:], start=1):
            word.bitwise_or_(more << (number * bits))
    return words.view(torch.int32)


def understood(config: Mapping[str, Any], names: Iterable[str]) -> bool:
    """Whether `schemes_in` and `codes_of` read such a checkpoint: integers, packed or int8, columns in order."""
    groups = list((config.get("config_groups") or {}).values())
    kinds = [group.get("format") or config.get("format") for group in groups]
    reorders = any(name.endswith(".weight_g_idx") for name in names)
    as_written = all(
        _dynamic(group["input_activations"]) if group.get("input_activations") else kind == PACKED
        for group, kind in zip(groups, kinds, strict=True)
    )
    return set(kinds) <= {PACKED, INTEGERS} and as_written and not reorders


def _dynamic(inputs: Mapping[str, Any]) -> bool:
    """Whether inputs are rounded as `_inputs` says, which is the way that is computed here."""
    return all(inputs.get(key) == value for key, value in _inputs(Scheme(8, True, None, inputs=8)).items() if value)  # type: ignore[union-attr]


def codes_of(checkpoint: Checkpoint, module: str, scheme: Scheme) -> tuple[Tensor, Grid]:
    """Codes int8 (rows, columns) and grid of a quantised linear."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    if scheme.inputs:
        return checkpoint.read(f"{module}.weight"), Grid(scheme, checkpoint.read(f"{module}.weight_scale"), None)
    shape = torch.Size(checkpoint.read(f"{module}.weight_shape").tolist())
    codes = unpack_from_int32(checkpoint.read(f"{module}.weight_packed"), scheme.bits, shape)
    scale = checkpoint.read(f"{module}.weight_scale")
    zero = None
    if not scheme.symmetric:
        packed = checkpoint.read(f"{module}.weight_zero_point")
        zero = unpack_from_int32(packed, scheme.bits, torch.Size([shape[0], scale.shape[1]]), packed_dim=0)
    return codes, Grid(scheme, scale, zero)


def quantization_config(schemes: dict[str, Scheme], other_linears: list[str]) -> dict[str, Any]:
    """The config.json section. `other_linears` are nn.Linear modules left dense (the head, ignored modules).

    One scheme: the group targets every Linear and ignores the rest; a head is named beside, since to vLLM it is none.
    Several: each group names its modules by regular expression, blocks folded together.
    """
    by_scheme: dict[Scheme, list[str]] = defaultdict(list)
    for module, scheme in schemes.items():
        by_scheme[scheme].append(module)
    ordered = sorted(by_scheme, key=lambda scheme: (-len(by_scheme[scheme]), scheme.label))
    groups = {
        f"group_{number}": {
            "targets": _patterns(by_scheme[scheme])
            if len(ordered) > 1
            else ["Linear", *_patterns([module for module in schemes if not _IN_BLOCK.fullmatch(module)])],
            "weights": _weights(scheme),
            "input_activations": _inputs(scheme),
            "output_activations": None,
            "format": INTEGERS if scheme.inputs else PACKED,
        }
        for number, scheme in enumerate(ordered)
    }
    kinds = {group["format"] for group in groups.values()}
    return {
        **({"dequantize": True} if unpacks_while_loading(list(ordered)) else {}),
        "quant_method": "compressed-tensors",
        "format": MIXED if len(kinds) > 1 else kinds.pop() if kinds else "dense",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": sorted(other_linears),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def unpacks_while_loading(schemes: list[Scheme]) -> bool:
    """Whether transformers must be asked to unpack while it loads, rather than in the first forward.

    compressed-tensors 0.18 to 0.20 give an empty packed module an unpacked zero point, which the stored one then does
    not fit (vllm-project/llm-compressor#1618). Unpacking while loading avoids it, but takes one scheme for the whole
    model. vLLM reads packed zero points and ignores the key.
    """
    return len(schemes) == 1 and not schemes[0].symmetric


def cannot_load(schemes: set[Scheme]) -> bool:
    """Whether transformers cannot load a mix of schemes: see `unpacks_while_loading`."""
    return len(schemes) > 1 and any(not scheme.symmetric for scheme in schemes)


def _weights(scheme: Scheme) -> dict[str, Any]:
    return {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "channel" if scheme.group_size is None else "group",
        "group_size": scheme.group_size,
        "dynamic": False,
        "actorder": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }


def _inputs(scheme: Scheme) -> dict[str, Any] | None:
    """Inputs rounded as they come, a scale a token."""
    if scheme.inputs is None:
        return None
    return {
        "num_bits": scheme.inputs,
        "type": "int",
        "symmetric": True,
        "strategy": "token",
        "group_size": None,
        "dynamic": True,
        "actorder": None,
        "observer": None,
        "observer_kwargs": {},
    }


def _cache_scheme(source: Checkpoint) -> dict[str, Any] | None:
    """How keys and values are kept, where the checkpoint has scales for them."""
    if not source.kv_scales:
        return None
    heads = source.header(source.kv_scales[0])[1][0]
    return {
        "num_bits": 8,
        "type": "float",
        "symmetric": True,
        "strategy": "attn_head" if len(source.header(source.kv_scales[0])[1]) == 3 and heads else "tensor",
        "group_size": None,
        "dynamic": False,
        "actorder": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }


def _patterns(modules: list[str]) -> list[str]:
    """One regular expression per module name with the block number folded: re:^model\\.layers\\.(0|3)\\.mlp\\.up$."""
    numbers: dict[tuple[str, str], list[str]] = defaultdict(list)
    for module in modules:
        match = _IN_BLOCK.fullmatch(module)
        if match:
            numbers[(match[1], match[3])].append(match[2])
        else:
            numbers[(module, "")].append("")
    patterns = []
    for (before, after), blocks in numbers.items():
        if not after:
            patterns.append(f"re:^{re.escape(before)}$")
        else:
            folded = "|".join(sorted(blocks, key=int))
            patterns.append(f"re:^{re.escape(before)}\\.({folded})\\.{re.escape(after)}$")
    return patterns


def schemes_in(checkpoint: Checkpoint) -> dict[str, Scheme]:
    """Scheme of each quantised module."""
    suffix = ".weight_scale"
    modules = [name.removesuffix(suffix) for name in checkpoint.names if name.endswith(suffix)]
    return schemes_by_target(checkpoint.config["quantization_config"], modules)


def schemes_by_target(config: Mapping[str, Any], modules: Iterable[str]) -> dict[str, Scheme]:
    """Scheme of each of these modules, by the config's own targets."""
    found: dict[str, Scheme] = {}
    for group in config["config_groups"].values():
        weights, inputs = group["weights"], group.get("input_activations")
        size = weights.get("group_size")
        scheme = Scheme(
            int(weights["num_bits"]),
            bool(weights["symmetric"]),
            None if weights["strategy"] == "channel" else int(size),
            int(inputs["num_bits"]) if inputs else None,
        )
        for module in modules:
            if module not in found and any(_matches(target, module) for target in group["targets"]):
                found[module] = scheme
    return found


def _matches(target: str, module: str) -> bool:
    if target.startswith("re:"):
        return re.match(target[3:], module) is not None
    return target in ("Linear", module)
