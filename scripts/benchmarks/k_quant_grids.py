"""Our search over a K-quant's scales beside llama.cpp's quantisers: weighted squared rounding error of single matrices.

    python scripts/benchmarks/k_quant_grids.py MODEL [--match '*.down_proj'] [--blocks 0,12,29]

MODEL is a folder. Both sides round to nearest and get the same importance of columns, drawn at random; llama.cpp also
without. Its library is that of `make loaders` (.loaders/llamacpp).
"""

from __future__ import annotations

import argparse
import ctypes
import fnmatch
import sys
import time
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor

from compress.checkpoints.reader import Checkpoint
from compress.quantization.grid import dequantize, quantize
from compress.quantization.k_quants import k_quant_grid
from compress.quantization.scheme import Scheme
from compress.quantization.super_blocks import K_QUANTS

ROOT = Path(__file__).resolve().parents[2]
FLOATS = ctypes.POINTER(ctypes.c_float)


def library() -> ctypes.CDLL:
    found = sorted((ROOT / ".loaders" / "llamacpp").glob("lib/python*/site-packages/llama_cpp/lib/libggml-base.so"))
    if not found:
        raise SystemExit("no .loaders/llamacpp here: run `make loaders` first")
    loaded = ctypes.CDLL(str(found[0]))
    loaded.ggml_quantize_chunk.restype = ctypes.c_size_t
    kinds = [ctypes.c_int, FLOATS, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, FLOATS]
    loaded.ggml_quantize_chunk.argtypes = kinds
    return loaded


def theirs(loaded: ctypes.CDLL, weight: Tensor, kind: gguf.GGMLQuantizationType, importance: Tensor | None) -> Tensor:
    """Values (rows, columns) that llama.cpp rounds a weight to."""
    rows, columns = weight.shape
    block, size = gguf.GGML_QUANT_SIZES[kind]
    given, out = np.ascontiguousarray(weight.numpy()), np.zeros(rows * columns // block * size, np.uint8)
    weights = None if importance is None else np.ascontiguousarray(importance.numpy())
    pointer = None if weights is None else weights.ctypes.data_as(FLOATS)
    loaded.ggml_quantize_chunk(kind.value, given.ctypes.data_as(FLOATS), out.ctypes.data, 0, rows, columns, pointer)
    return torch.from_numpy(gguf.dequantize(out.reshape(rows, -1), kind))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--match", default="*.down_proj")
    parser.add_argument("--blocks", default="0,12,29")
    arguments = parser.parse_args()
    checkpoint, loaded = Checkpoint(arguments.model), library()
    arch, generator = checkpoint.architecture, torch.Generator().manual_seed(0)
    names = [f"{arch.block_name(int(index))}.{leaf}" for index in arguments.blocks.split(",") for leaf in arch.linears]
    names = [name for name in names if fnmatch.fnmatchcase(name, arguments.match)]
    print("type, ours, llama.cpp with the importance, without; ours / llama.cpp with; seconds of each")
    for bits, layout in K_QUANTS.items():
        sums, spent = dict.fromkeys(("ours", "with", "without"), 0.0), [0.0, 0.0]
        for name in names:
            weight = checkpoint.matrix(name).float().contiguous()
            importance = torch.rand(weight.shape[1], generator=generator).square() * 4 + 0.05
            whole, kind = float((weight.square() * importance).sum()), gguf.GGMLQuantizationType[layout.name]
            started = time.perf_counter()
            grid = k_quant_grid(weight, importance, Scheme.of_k_quant(bits))
            values = {"ours": dequantize(quantize(weight, grid), grid)}
            spent[0] += time.perf_counter() - started
            started = time.perf_counter()
            values["with"] = theirs(loaded, weight, kind, importance)
            spent[1] += time.perf_counter() - started
            values["without"] = theirs(loaded, weight, kind, None)
            for side, value in values.items():
                sums[side] += float(((value - weight).square() * importance).sum()) / whole / len(names)
        ratio = sums["ours"] / sums["with"]
        errors = ", ".join(f"{value:.3g}" for value in sums.values())
        print(f"{layout.name}: {errors}; {ratio:.3f}; {spent[0]:.2f}, {spent[1]:.2f}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
