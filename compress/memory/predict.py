"""Bytes before they are spent.

stored      tensor bytes of the exported files: exact, from shapes and schemes
resident    the same, for a runtime that keeps weights packed
KV cache    2 x blocks x kv_heads x head_dim x tokens x concurrency x bytes; a sliding block keeps its window only
peak host   what the run holds at its worst moment: the interpreter with its libraries, one block, activations of
            the calibration windows, and the largest Hessian with its factor or the sums of a shift beside it
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from compress.architecture import Dimensions
from compress.quantization.scheme import Scheme
from compress.quantization.target_shift import TOKENS_PER_COLUMN

INTERPRETER = 330 * 2**20
"""Anonymous memory of Python with torch, transformers and datasets imported and used once; measured, see
docs/benchmarks/memory.md."""

NUMBA = 45 * 2**20
"""What numba and the kernels that it compiles add, measured."""

LM_EVAL = 100 * 2**20
"""What importing lm-eval and building a task's prompts adds."""


class Format(Protocol):
    """What a format of artifacts says of sizes (`checkpoints.formats`)."""

    def stored_bytes(self, scheme: Scheme, rows: int, columns: int, dtype_bytes: int) -> int:
        """Bytes of a quantised linear's weight."""

    def other_bytes(self, shape: tuple[int, ...], dtype_bytes: int) -> int:
        """Bytes of any other tensor."""


def stored_bytes(
    parameters: dict[str, tuple[int, ...]],
    matrices: dict[str, tuple[int, int]],
    schemes: dict[str, Scheme],
    dtype_bytes: int,
    format_: Format,
) -> int:
    """Tensor bytes of the export. `parameters`: shape of each stored one; `matrices`: (rows, columns) of linears."""
    total = 0
    for name, shape in parameters.items():
        module, _, leaf = name.rpartition(".")
        if leaf == "weight" and module in schemes:
            total += format_.stored_bytes(schemes[module], *matrices[module], dtype_bytes)
        else:
            total += format_.other_bytes(shape, dtype_bytes)
    return total


def effective_bits(
    matrices: dict[str, tuple[int, int]], schemes: dict[str, Scheme], dtype_bytes: int, format_: Format
) -> float | None:
    """8 x stored bytes of the quantised linears, with scales, zero points and shapes / their parameters. Schemes of
    an embedding or a head, which are not among `matrices`, do not count."""
    schemes = {name: scheme for name, scheme in schemes.items() if name in matrices}
    if not schemes:
        return None
    stored = sum(format_.stored_bytes(scheme, *matrices[name], dtype_bytes) for name, scheme in schemes.items())
    return 8 * stored / sum(math.prod(matrices[name]) for name in schemes)


def kv_cache_bytes(dimensions: Dimensions, context: int, concurrency: int, dtype_bytes: int) -> int:
    """Bytes of keys and values of `concurrency` sequences of `context` tokens."""
    window = min(context, dimensions.sliding_window or context)
    full = (dimensions.blocks - dimensions.sliding_blocks) * context
    sliding = dimensions.sliding_blocks * window
    return 2 * (full + sliding) * dimensions.kv_heads * dimensions.head_dim * concurrency * dtype_bytes


@dataclass(frozen=True)
class WalkLoad:
    """What decides the peaks of a run. Counts; `compute_bytes` per element."""

    parameters: int
    block_parameters: int
    widest_input: int
    """Columns of the widest linear input (the MLP's inner width)."""
    rows_of_widest: int
    hidden: int
    calibration_tokens: int
    streams: float
    """Sets of calibration activations held at once: 1.25 where a quarter of the source's run beside the compressed."""
    held_tokens: int
    """Calibration tokens whose activations inside a block are held at once: all, or a batch of replayed blocks."""
    waiting_tokens: int
    """Those of which only the states entering the block are there: none, or all where blocks are replayed; a GPU's wait
    on the host."""
    refines: bool
    """Whether statistics of held-out text are kept apart."""
    judges_shifts: bool
    """Whether the sums of a shift are kept apart for held-out text as well."""
    evaluation_tokens: int
    vocabulary: int
    compute_bytes: int


def calibration_peak_bytes(load: WalkLoad) -> int:
    """Peak anonymous host memory while a calibrated stage solves.

    At the worst moment all batches are held at the last group: the residual, the normed states and the inner
    activations of every token; beside them the source's evaluation states, one block with its codes, and for the widest
    input what `_matrices` counts. A shift needs the source's weights beside the new ones. Where blocks are replayed,
    one batch has activations inside, and the states entering the block are there for every token.
    """
    shifts = _shifts(load, load.hidden)
    streams = load.streams if shifts else 1
    inside = load.held_tokens * (load.widest_input + 3 * load.hidden) + load.waiting_tokens * load.hidden
    activations = streams * inside * load.compute_bytes
    kept = load.evaluation_tokens * load.hidden * 4
    block = load.block_parameters * ((2 if shifts else 1) * load.compute_bytes + 1)
    solve = (16 if load.refines else 8) * load.rows_of_widest * load.hidden * 4
    return INTERPRETER + round(activations) + kept + block + max(_matrices(load), solve)


def calibration_device_bytes(load: WalkLoad, batch_tokens: int) -> int:
    """Peak bytes of tensors on a GPU while a calibrated stage solves; `load` counts what lies there.

    As on a host, without an interpreter, and with what is in flight inside the block for the batch that is running.
    """
    inside = 4 * batch_tokens * load.widest_input * load.compute_bytes
    return calibration_peak_bytes(load) - INTERPRETER + inside


def pinned_bytes(load: WalkLoad, batch_tokens: int) -> int:
    """Bytes of hidden states that wait on a GPU's host: torch rounds each batch's up to a power of two."""
    batch = min(batch_tokens, load.calibration_tokens) * load.hidden * load.compute_bytes
    batches = math.ceil(load.streams * load.calibration_tokens / max(1, batch_tokens))
    return batches * (1 << max(0, batch - 1).bit_length()) if batch else 0


def _shifts(load: WalkLoad, columns: int) -> bool:
    """Whether the source's stream covers tokens enough to shift linears with `columns` inputs."""
    return (load.streams - 1) * load.calibration_tokens >= TOKENS_PER_COLUMN * columns


def _matrices(load: WalkLoad) -> int:
    """Bytes of the matrices of the widest input, (columns, columns) unless said, at the worse of two moments:

    factorising   H and its factor in float64, U and a shift in float32
    shifting      H, the pairs' own H and D, and R (hidden, columns), in float64, and the shift in float32

    Where refinements are judged, there is one more in float64, later two in float32; where shifts are, all but the
    factor again.
    """
    square, oblong = load.widest_input**2, load.widest_input * load.hidden
    held_out = square * 8 if load.refines else 0
    if not _shifts(load, load.widest_input):
        return 2 * square * 8 + square * 4 + held_out
    shift = 4 * (square + oblong) + (8 * (2 * square + oblong) if load.judges_shifts else 0)
    return max(2 * square * 8 + square * 4, 3 * square * 8 + oblong * 8) + shift + held_out


def backward_peak_bytes(load: WalkLoad, moments: int) -> int:
    """Peak anonymous host memory of a backward pass that sums up `moments` bytes a block: those, the states of all its
    windows and their gradients, the source's evaluation states, a block or the head, logits of a chunk and theirs."""
    kept = load.evaluation_tokens * load.hidden * 4
    part = max(load.block_parameters, load.vocabulary * load.hidden) * load.compute_bytes
    states = 3 * load.calibration_tokens * load.hidden * load.compute_bytes
    return INTERPRETER + moments + states + kept + part + 4 * 64 * load.vocabulary * 4


def evaluation_peak_bytes(load: WalkLoad) -> int:
    """Peak anonymous host memory of measuring: final states of both models, both heads, logits of a chunk."""
    states = 3 * load.evaluation_tokens * load.hidden * 4
    heads = 2 * load.vocabulary * load.hidden * load.compute_bytes
    logits = 4 * 64 * load.vocabulary * 4
    return INTERPRETER + states + heads + logits + load.block_parameters * load.compute_bytes


def asking_peak_bytes(load: WalkLoad, states: int, positions: int) -> int:
    """Peak anonymous host memory of asking tasks: lm-eval, the states (bytes) of one walk with what is kept of it,
    one block or the head, logits of a chunk; beside them both models' states on the evaluation text.
    """
    kept = 2 * load.evaluation_tokens * load.hidden * 4 + positions * load.hidden * 4
    part = max(load.block_parameters, load.vocabulary * load.hidden) * load.compute_bytes
    return INTERPRETER + LM_EVAL + states + kept + part + 3 * 64 * load.vocabulary * 4


def reload_peak_bytes(load: WalkLoad) -> int:
    """Peak anonymous host memory of the round trip: the whole export as its public loader unpacks it to float32.

    The loader holds 16-bit weights while the last module becomes float32, and our head and the logits of a window are
    beside them.
    """
    states = 2 * load.evaluation_tokens * load.hidden * 4
    head = load.vocabulary * load.hidden * 4
    logits = 5 * 256 * load.vocabulary * 4
    return INTERPRETER + load.parameters * 6 + states + head + logits


@dataclass(frozen=True)
class TrainingLoad:
    """What decides the memory of training scales and norms. Counts; `compute_bytes` per element."""

    quantised: int
    """Weights of quantised linears: a byte each while they train."""
    dense: int
    """Other parameters of all blocks."""
    trained: int
    """Numbers that are trained, of all blocks."""
    block_parameters: int
    block_width: int
    """Rows and columns of all linears of a block together: what one token leaves inside a block."""
    blocks: int
    hidden: int
    vocabulary: int
    batch_tokens: int
    kept_tokens: int
    """Tokens of all windows, whose states are kept."""
    compute_bytes: int
    moved: int = 0
    """Codes among them."""
    fused_attention: bool = True
    """Whether attention leaves no scores (tokens x tokens) for its backward pass."""


def inside_bytes(load: TrainingLoad) -> int:
    """Bytes of what one block's forward pass leaves for its backward pass, for a batch: what its linears take and
    give, and three quarters of that for norms, rotations and activations (measured: 1.04 to 1.69 times it in all, by
    architecture); its moved codes."""
    return load.batch_tokens * load.block_width * load.compute_bytes * 7 // 4 + load.moved // load.blocks


def whole_model_training_bytes(load: TrainingLoad, kept_blocks: int = 0) -> int:
    """Bytes that training all blocks at once takes beside what the process holds already.

    Codes, dense parameters and the head, which training on a CPU multiplies with in bfloat16 too; seven float32
    numbers a trained one (base, factor, gradient, two moments, best, and a copy while saving); embeddings and the
    source's final states of every token; the states entering each block, twice the inside of one block and the inside
    of `kept_blocks`, for a batch; one weight matrix and its gradient; six matrices of logits.
    """
    head = load.vocabulary * load.hidden * (load.compute_bytes + (2 if load.compute_bytes == 4 else 0))
    weights = load.quantised + load.dense * load.compute_bytes + head
    kept = 2 * load.kept_tokens * load.hidden * load.compute_bytes
    batch = load.batch_tokens * (load.blocks * load.hidden + 2 * load.block_width) * load.compute_bytes
    widest = 2 * load.block_width * load.hidden * 4
    batch += kept_blocks * inside_bytes(load)
    return weights + load.trained * 28 + kept + batch + widest + 6 * 128 * load.vocabulary * 4


def block_training_bytes(load: TrainingLoad) -> int:
    """Bytes that training one block at a time takes: the block twice, three states of every token, its inside."""
    kept = 3 * load.kept_tokens * load.hidden * load.compute_bytes
    block = 2 * load.block_parameters * load.compute_bytes
    batch = 2 * load.batch_tokens * load.block_width * load.compute_bytes
    factors = load.trained * 2 + load.trained * 28 // load.blocks
    head = load.vocabulary * load.hidden * load.compute_bytes + 6 * 128 * load.vocabulary * 4
    return block + factors + kept + batch + head


def training_disk_bytes(load: TrainingLoad) -> int:
    """Bytes of the files that a killed run goes on from: the source's final states, and five numbers a trained one."""
    return load.kept_tokens * load.hidden * load.compute_bytes + 20 * load.trained
