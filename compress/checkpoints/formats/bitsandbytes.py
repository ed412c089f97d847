"""What bitsandbytes saves and transformers loads as `bitsandbytes`: NF4 and FP4, or LLM.int8.

4 bits, per linear of n = rows x columns weights in runs of g, row after row:

    <module>.weight                            uint8 (n / 2, 1)    two codes a byte, the first in the high half
    <module>.weight.absmax                     float32 (n / g,)    scales; uint8 where they are nested
    <module>.weight.quant_map                  float32 (16,)       the table that codes index
    <module>.weight.nested_absmax, .nested_quant_map               scales of scales in runs of 256, and their table
    <module>.weight.quant_state.bitsandbytes__nf4                  JSON in bytes: shape, run length, dtype

8 bits: <module>.weight int8 (rows, columns), .SCB float32 (rows,) = 127 x scale, .weight_format uint8 () = 0 (rows in
order).

The files are written from the codes, never from a model that bitsandbytes has run: on CPUs with AVX512-BF16 it repacks
weights for its own kernel in the first forward, and what is saved after that does not always come back equal.
Sources: bitsandbytes' QuantState.as_dict and Int8Params; Dettmers et al., arXiv 2305.14314 and 2208.07339.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress.architecture import Architecture
from compress.checkpoints.formats.base import Format, Shapes, Written, dense_linears, entries_of, write_folder
from compress.checkpoints.reader import Checkpoint
from compress.checkpoints.stream import Entry
from compress.errors import EnvironmentLacksError
from compress.quantization.grid import FLOATING_GRIDS, Grid, Nested
from compress.quantization.scheme import Scheme

NESTED_RUN = 256
"""Scales that share a scale."""
RANGE = 127.0
KERNEL_ROWS = 32
"""Rows that the kernel for AVX512-BF16 takes at a time; it stops at a remainder."""


class BitsAndBytes(Format):
    """One of bitsandbytes' schemes for the whole model; linears may be left out."""

    name = "bitsandbytes"
    description = "NF4, FP4 or LLM.int8 as bitsandbytes saves them; loads in transformers (vLLM 0.32 dropped it)"
    packs = True
    loader_needs = ("bitsandbytes",)
    fuses = False

    def refusal(self, scheme: Scheme, rows: int, columns: int) -> str | None:
        if scheme.grid == "int" and not scheme.outliers:
            return "it holds what a bitsandbytes stage makes"
        return None

    def refuses(self, schemes: Mapping[str, Scheme], shapes: Shapes, architecture: Architecture) -> list[str]:
        labels = sorted({scheme.label for scheme in schemes.values()})
        if len(labels) < 2:
            return []
        return [f"{self.name} has one scheme for the whole model, this one has {' and '.join(labels)}"]

    def stored_bytes(self, scheme: Scheme, rows: int, columns: int, dtype_bytes: int) -> int:
        if scheme.grid == "int":
            return rows * columns + 4 * rows + 1
        runs = rows * scheme.groups(columns)
        nested = runs + 4 * -(-runs // NESTED_RUN) + 4 * 256
        # The state is text: as long as the numbers in it; a nested one has the offset too.
        state = len(_state(scheme, rows, columns, torch.float16, 0.123456789012345 if scheme.nested else None))
        return rows * columns // 2 + (nested if scheme.nested else 4 * runs) + 4 * 16 + state

    def write(self, source: Checkpoint, folder: Path, dtype: torch.dtype, shard_bytes: int) -> Written:
        def quantised(module: str, scheme: Scheme) -> list[Entry]:
            return _entries(module, scheme, source, dtype)

        section = quantization_config(source, dtype) if source.schemes else None
        return write_folder(source, folder, entries_of(source, dtype, quantised), dtype, shard_bytes, section)


def _entries(module: str, scheme: Scheme, source: Checkpoint, dtype: torch.dtype) -> list[Entry]:
    rows, columns = source.matrix_shape(module)
    if scheme.grid == "int":
        return [
            Entry(f"{module}.weight", torch.int8, (rows, columns), lambda: source.codes(module)[0]),
            Entry(f"{module}.SCB", torch.float32, (rows,), lambda: source.codes(module)[1].scale.float()[:, 0] * RANGE),
            Entry(f"{module}.weight_format", torch.uint8, (), lambda: torch.tensor(0, dtype=torch.uint8)),
        ]
    codes, grid = source.codes(module)
    tensors = {"": pack(codes), ".quant_map": FLOATING_GRIDS[scheme.grid], ".absmax": grid.scale.flatten()}
    offset = None
    if isinstance(grid.nested, Nested):
        inner, offset = grid.nested, float(grid.nested.offset)
        tensors |= {".absmax": inner.codes, ".nested_absmax": inner.absmax, ".nested_quant_map": inner.table}
    state = torch.frombuffer(bytearray(_state(scheme, rows, columns, dtype, offset)), dtype=torch.uint8)
    tensors[f".quant_state.bitsandbytes__{scheme.grid}"] = state
    return [
        Entry(f"{module}.weight{leaf}", tensor.dtype, tuple(tensor.shape), lambda tensor=tensor: tensor)  # type: ignore[misc]
        for leaf, tensor in tensors.items()
    ]


def pack(codes: Tensor) -> Tensor:
    """int8 codes 0 to 15 (rows, columns), columns even -> uint8 (rows x columns / 2, 1)."""
    pairs = codes.to(torch.uint8).view(-1, 2)
    return (pairs[:, :1] << 4) | pairs[:, 1:]


def unpack(packed: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of `pack`."""
    return torch.cat([packed.view(-1, 1) >> 4, packed.view(-1, 1) & 15], dim=1).view(rows, columns).to(torch.int8)


def nested_scales(absmax: Tensor) -> Nested:
    """Scales float32 (n,) rounded around their mean, by bitsandbytes' dynamic 8-bit map."""
    functional = require()
    offset = absmax.mean().view(1)
    codes, state = functional.quantize_blockwise((absmax - offset).contiguous(), blocksize=NESTED_RUN)
    return Nested(codes.flatten().cpu(), state.absmax.cpu(), state.code.float().cpu(), offset.cpu(), NESTED_RUN)


def require() -> Any:
    """bitsandbytes' functions. Raises EnvironmentLacksError where it is not installed."""
    # While it is imported it asks for a package of faster kernels, which a user takes for a fault of the run.
    logger = logging.getLogger("bitsandbytes")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        import bitsandbytes.functional as functional
    except ImportError as error:
        raise EnvironmentLacksError(
            f"bitsandbytes is not usable here ({error}). Install it with: pip install 'compress-models[bitsandbytes]'"
        ) from error
    finally:
        logger.setLevel(before)
    return functional


def _state(scheme: Scheme, rows: int, columns: int, dtype: torch.dtype, offset: float | None) -> bytes:
    described: dict[str, Any] = {
        "quant_type": scheme.grid,
        "blocksize": scheme.group_size,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": [rows, columns],
    }
    if offset is not None:
        described |= {"nested_blocksize": NESTED_RUN, "nested_dtype": "float32", "nested_offset": offset}
    return json.dumps(described).encode()


def quantization_config(source: Checkpoint, dtype: torch.dtype) -> dict[str, Any]:
    """The section of config.json."""
    scheme = next(iter(source.schemes.values()))
    four = scheme.grid != "int"
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": four,
        "load_in_8bit": not four,
        "bnb_4bit_quant_type": scheme.grid if four else "fp4",
        "bnb_4bit_use_double_quant": scheme.nested,
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_threshold": scheme.outliers or 6.0,
        "llm_int8_skip_modules": sorted(dense_linears(source)),
        "llm_int8_has_fp16_weight": False,
        "llm_int8_enable_fp32_cpu_offload": False,
    }


# --- reading ---------------------------------------------------------------------------------------------------------


def understood(config: Mapping[str, Any], names: Iterable[str]) -> bool:
    """Whether linears are kept in one of the two forms above, and not in one that was repacked for a device."""
    del config
    leaves = {name.rpartition(".")[2] for name in names}
    return "SCB" in leaves or any(leaf.startswith("bitsandbytes__") for leaf in leaves)


def without_cpu_kernel(model: nn.Module, where_it_stops: bool = False) -> bool:
    """Let a loaded model compute from the values as they are stored, in the dtype of its inputs; with `where_it_stops`
    only linears that the kernel refuses. Returns whether there were any that would have run it.

    On a CPU with AVX512-BF16, 0.50 repacks 4-bit weights in the first forward for a kernel in bfloat16, and stops at
    linears whose rows do not divide by 32. What that changes is the library's arithmetic, not what the files say.
    """
    changed = False
    for module in model.modules():
        stops = getattr(module, "out_features", 0) % KERNEL_ROWS != 0
        if getattr(module, "support_avx512bf16_for_cpu", False) and (stops or not where_it_stops):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
            changed = True
    return changed


def schemes_in(checkpoint: Checkpoint) -> dict[str, Scheme]:
    found: dict[str, Scheme] = {}
    threshold = float(checkpoint.config["quantization_config"].get("llm_int8_threshold") or 6.0)
    for name in checkpoint.names:
        if name.endswith(".SCB"):
            found[name.removesuffix(".SCB")] = Scheme(8, True, None, inputs=8, outliers=threshold)
        elif ".quant_state.bitsandbytes__" in name:
            state = _read_state(checkpoint, name)
            grid = "nf4" if state["quant_type"] == "nf4" else "fp4"
            nested = "nested_offset" in state
            module = name.partition(".weight.quant_state.")[0]
            found[module] = Scheme(4, True, int(state["blocksize"]), grid=grid, nested=nested)  # type: ignore[arg-type]
    return found


def codes_of(checkpoint: Checkpoint, module: str, scheme: Scheme) -> tuple[Tensor, Grid]:
    """Codes int8 (rows, columns) and grid."""
    if scheme.grid == "int":
        scale = checkpoint.read(f"{module}.SCB").unsqueeze(1) / RANGE
        return checkpoint.read(f"{module}.weight"), Grid(scheme, scale, None)
    weight = f"{module}.weight"
    state = _read_state(checkpoint, f"{weight}.quant_state.bitsandbytes__{scheme.grid}")
    rows, columns = state["shape"]
    absmax, nested = checkpoint.read(f"{weight}.absmax"), None
    if scheme.nested:
        parts = absmax, checkpoint.read(f"{weight}.nested_absmax"), checkpoint.read(f"{weight}.nested_quant_map")
        nested = Nested(*parts, torch.tensor([state["nested_offset"]]), int(state["nested_blocksize"]))
        absmax = nested.scales()
    grid = Grid(scheme, absmax.float().view(rows, -1), None, nested)
    return unpack(checkpoint.read(weight), rows, columns), grid


def _read_state(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    state: dict[str, Any] = json.loads(bytes(checkpoint.read(name).tolist()))
    return state
