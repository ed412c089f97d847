"""Export to compressed-tensors `pack-quantized`, and reading it back.

Layout per quantised linear: <module>.weight_packed int32 (codes + 2^(b-1), packed densely along columns),
weight_scale (rows, groups), weight_shape int64 (2,), and for asymmetric schemes weight_zero_point int32 packed along
rows. config.json carries `quantization_config` with one config group a scheme. Packing is the library's own; an
independent unpacker in tests/checkpoints checks it.
Format: https://github.com/vllm-project/compressed-tensors
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compress.checkpoints.stream import Entry
from compress.quantization.grid import Grid
from compress.quantization.scheme import Scheme

if TYPE_CHECKING:
    from compress.checkpoints.reader import Checkpoint

FORMAT = "pack-quantized"


def entries_of(module: str, scheme: Scheme, source: Checkpoint, scale_dtype: torch.dtype) -> list[Entry]:
    """The tensors of one quantised linear, packed when they are written."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    rows, columns = source.header(f"{module}.codes")[1]
    groups = scheme.groups(columns)
    entries = [
        Entry(
            f"{module}.weight_packed",
            torch.int32,
            (rows, math.ceil(columns * scheme.bits / 32)),
            lambda: pack_to_int32(source.read(f"{module}.codes"), scheme.bits),
        ),
        Entry(f"{module}.weight_scale", scale_dtype, (rows, groups), lambda: source.read(f"{module}.scale")),
        Entry(f"{module}.weight_shape", torch.int64, (2,), lambda: torch.tensor([rows, columns])),
    ]
    if not scheme.symmetric:
        shape = (math.ceil(rows * scheme.bits / 32), groups)
        entries.append(
            Entry(
                f"{module}.weight_zero_point",
                torch.int32,
                shape,
                lambda: pack_to_int32(source.read(f"{module}.zero_point"), scheme.bits, packed_dim=0),
            )
        )
    return entries


def unpack(checkpoint: Checkpoint, module: str, scheme: Scheme) -> tuple[Tensor, Grid]:
    """Codes int8 (rows, columns) and grid of a packed linear."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

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

    One scheme: the group targets every Linear and ignores the rest. Several: each group names its modules by regular
    expression, blocks folded together.
    """
    by_scheme: dict[Scheme, list[str]] = defaultdict(list)
    for module, scheme in schemes.items():
        by_scheme[scheme].append(module)
    ordered = sorted(by_scheme, key=lambda scheme: (-len(by_scheme[scheme]), scheme.label))
    groups = {
        f"group_{number}": {
            "targets": ["Linear"] if len(ordered) == 1 else _patterns(by_scheme[scheme]),
            "weights": _weights(scheme),
            "input_activations": None,
            "output_activations": None,
            "format": FORMAT,
        }
        for number, scheme in enumerate(ordered)
    }
    return {
        **({"dequantize": True} if unpacks_while_loading(list(ordered)) else {}),
        "quant_method": "compressed-tensors",
        "format": FORMAT,
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


def _patterns(modules: list[str]) -> list[str]:
    """One regular expression per module name with the block number folded: re:^model\\.layers\\.(0|3)\\.mlp\\.up$."""
    numbers: dict[tuple[str, str], list[str]] = defaultdict(list)
    for module in modules:
        match = re.fullmatch(r"(.+?)\.(\d+)\.(.+)", module)
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


def schemes_in(config: dict[str, Any], modules: list[str]) -> dict[str, Scheme]:
    """Scheme of each packed module, by the config's own targets."""
    found: dict[str, Scheme] = {}
    for group in config["config_groups"].values():
        weights = group["weights"]
        size = weights.get("group_size")
        scheme = Scheme(
            int(weights["num_bits"]),
            bool(weights["symmetric"]),
            None if weights["strategy"] == "channel" else int(size),
        )
        for module in modules:
            if module not in found and any(_matches(target, module) for target in group["targets"]):
                found[module] = scheme
    return found


def _matches(target: str, module: str) -> bool:
    if target.startswith("re:"):
        return re.match(target[3:], module) is not None
    return target in ("Linear", module)
