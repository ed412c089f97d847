"""Bytes before they are spent.

stored      tensor bytes of the exported files: exact, from shapes and schemes
resident    the same, for a runtime that keeps weights packed
KV cache    2 x blocks x kv_heads x head_dim x tokens x concurrency x bytes; a sliding block keeps its window only
peak host   what the run holds at its worst moment: the interpreter with its libraries, one block, activations of
            all calibration windows, and the largest Hessian with its factors
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from compress.architecture import Dimensions
from compress.quantization.scheme import Scheme

INTERPRETER = 330 * 2**20
"""Anonymous memory of Python with torch, transformers and datasets imported and used once; measured, see
docs/benchmarks/memory.md."""


def stored_bytes(
    parameters: dict[str, tuple[int, ...]],
    matrices: dict[str, tuple[int, int]],
    schemes: dict[str, Scheme],
    dtype_bytes: int,
    packs: bool,
) -> int:
    """Tensor bytes of the export. `parameters`: shape of each stored one; `matrices`: (rows, columns) of linears."""
    total = 0
    for name, shape in parameters.items():
        module, _, leaf = name.rpartition(".")
        if leaf == "weight" and module in schemes and packs:
            total += schemes[module].stored_bytes(*matrices[module], scale_bytes=dtype_bytes)
        else:
            total += math.prod(shape) * dtype_bytes
    return total


def effective_bits(matrices: dict[str, tuple[int, int]], schemes: dict[str, Scheme], dtype_bytes: int) -> float | None:
    """8 x stored bytes of the quantised linears, with scales, zero points and shapes / their parameters."""
    if not schemes:
        return None
    stored = sum(scheme.stored_bytes(*matrices[name], scale_bytes=dtype_bytes) for name, scheme in schemes.items())
    return 8 * stored / sum(math.prod(matrices[name]) for name in schemes)


def kv_cache_bytes(dimensions: Dimensions, context: int, concurrency: int, dtype_bytes: int) -> int:
    """Bytes of keys and values of `concurrency` sequences of `context` tokens."""
    window = min(context, dimensions.sliding_window or context)
    full = (dimensions.blocks - dimensions.sliding_blocks) * context
    sliding = dimensions.sliding_blocks * window
    return 2 * (full + sliding) * dimensions.kv_heads * dimensions.head_dim * concurrency * dtype_bytes


@dataclass(frozen=True)
class WalkLoad:
    """What decides the peak of a walk. Counts; `compute_bytes` per element."""

    block_parameters: int
    widest_input: int
    rows_of_widest: int
    outer_parameters: int
    hidden: int
    inner: int
    """Columns of the widest linear input (the MLP's inner width)."""
    tokens: int
    batch_tokens: int
    vocabulary: int
    compute_bytes: int


def calibration_peak_bytes(load: WalkLoad) -> int:
    """Peak anonymous host memory while a calibrated stage solves.

    At the worst moment all batches are held at the last group: residual and inner activations of every token; beside
    them one block (loaded weights and those being written), and the Hessian with its ordered copy, factor and inverse.
    """
    activations = load.tokens * (load.hidden + load.inner) * load.compute_bytes
    block = 2 * load.block_parameters * load.compute_bytes
    hessian = 5 * load.widest_input**2 * 8
    transient = 3 * load.batch_tokens * load.inner * load.compute_bytes
    solve = 4 * load.rows_of_widest * load.widest_input * 4
    return INTERPRETER + activations + block + max(hessian, transient, solve)


def evaluation_peak_bytes(load: WalkLoad, eval_tokens: int) -> int:
    """Peak anonymous host memory of measuring: final states of both models, both heads, logits of a chunk."""
    states = 3 * eval_tokens * load.hidden * 4
    heads = 2 * load.vocabulary * load.hidden * load.compute_bytes
    logits = 4 * 64 * load.vocabulary * 4
    return INTERPRETER + states + heads + logits + load.block_parameters * load.compute_bytes


def reload_peak_bytes(parameters: int, load: WalkLoad, eval_tokens: int) -> int:
    """Peak anonymous host memory of the round trip: the whole export, dequantised to float32 by its public loader."""
    states = 2 * eval_tokens * load.hidden * 4
    return INTERPRETER + parameters * 4 + states + load.vocabulary * load.hidden * 4
