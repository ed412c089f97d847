"""What each runtime serves of each format: one table, which `plan` warns by and docs/formats.md shows.

A row is about one kind of scheme. `source` says where it is from: a test of ours, a recorded run of a loader
(`make loaders`, docs/benchmarks/loaders.md; `make serve-vllm`, docs/benchmarks/serving.md), or what the runtime's own
documentation or code says (read in 2026-11, vLLM's in 0.32.0). `vLLM` is vLLM on GPUs, not run by us; `vLLM on a CPU`
is its CPU build, whose kernels are others and fewer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from compress.checkpoints.formats.base import Shapes
from compress.checkpoints.formats.gguf_names import KINDS
from compress.quantization.scheme import Scheme

VLLM = "https://github.com/vllm-project/vllm/blob/v0.32.0/vllm/model_executor"
VLLM_DOCS = "https://docs.vllm.ai/en/latest/features/quantization"
MARLIN = f"[marlin.py]({VLLM}/kernels/linear/mixed_precision/marlin.py) of 0.32.0"
HUMMING = f"[humming.py]({VLLM}/kernels/linear/mixed_precision/humming.py) of 0.32.0"
AUTO_GPTQ = f"[auto_gptq.py]({VLLM}/layers/quantization/auto_gptq.py) of 0.32.0"
METHODS = f"[its methods]({VLLM}/layers/quantization/__init__.py) of 0.32.0"
TESTS = "tested here: tests/checkpoints/"
LOADERS = "run here: docs/benchmarks/loaders.md"
SERVING = "run here with 0.32.0: docs/benchmarks/serving.md"
SERVED_GROUPS = (32, 64, 128, None)
"""What Marlin takes; None is a scale a row."""


@dataclass(frozen=True)
class Row:
    """`takes` tells whether a scheme is of this row's kind, `fits` is the kernels' rule on (rows, columns); the other
    fields are for people."""

    runtime: str
    format: str
    what: str
    takes: Callable[[Scheme], bool]
    groups: str
    mixed: str
    shapes: str
    limits: str
    source: str
    fits: Callable[[int, int], bool] = lambda rows, columns: True


def _weights(*bits: int, symmetric: bool | None = True, served: bool = False) -> Callable[[Scheme], bool]:
    """Integer weights alone, of these widths; `served`: groups that Marlin takes."""

    def takes(scheme: Scheme) -> bool:
        plain = scheme.grid == "int" and scheme.inputs is None and scheme.bits in bits
        suits = symmetric is None or scheme.symmetric == symmetric
        return plain and suits and not scheme.of_super_blocks and (not served or scheme.group_size in SERVED_GROUPS)

    return takes


def _floats(scheme: Scheme) -> bool:
    return scheme.grid != "int"


def _w8a8(scheme: Scheme) -> bool:
    return scheme.inputs is not None and scheme.outliers is None


def _llm_int8(scheme: Scheme) -> bool:
    return scheme.outliers is not None


def _none(scheme: Scheme) -> bool:
    return False


def _blocks_of_32(scheme: Scheme) -> bool:
    free = scheme.free_minima and scheme.bits <= 5
    return free or _weights(2, 3, 4, 5, symmetric=None)(scheme) or _weights(6, 8)(scheme)


def _k_quant(scheme: Scheme) -> bool:
    return scheme.k_quant is not None


def _by_256(rows: int, columns: int) -> bool:
    return columns % 256 == 0


def _by_32(rows: int, columns: int) -> bool:
    return rows % 32 == 0 and columns % 32 == 0


BNB_ON_AVX512 = "bitsandbytes on CPUs with AVX512-BF16"
_PADDED = "any; padded, which costs time, where rows do not divide by 64 and columns by 128, or the other way round"

SUPPORT: tuple[Row, ...] = (
    Row(
        *("transformers", "compressed-tensors", "2, 3, 4, 5, 6, 8 bits symmetric"),
        _weights(2, 3, 4, 5, 6, 8),
        *("any that divides", "yes", "any", "unpacks in the first forward", f"{TESTS}test_compressed_tensors.py"),
    ),
    Row(
        *("transformers", "compressed-tensors", "the same, asymmetric"),
        _weights(2, 3, 4, 5, 6, 8, symmetric=False),
        *("any that divides", "no: refused by `plan`", "any", "unpacks while loading"),
        f"{TESTS}test_compressed_tensors.py; vllm-project/llm-compressor#1618",
    ),
    Row(
        *("transformers", "compressed-tensors", "8 bits, int8 inputs (W8A8)"),
        _w8a8,
        *("a row", "yes", "any", "computes with rounded inputs in floating point, not in integers"),
        "tested here: tests/stages/test_w8a8.py",
    ),
    Row(
        *("vLLM", "compressed-tensors", "4, 8 bits symmetric"),
        _weights(4, 8, served=True),
        *("32, 64, 128, a row", "yes", _PADDED, "NVIDIA GPUs: Marlin from Turing on, Machete on Hopper"),
        MARLIN,
    ),
    Row(
        *("vLLM", "compressed-tensors", "4 bits asymmetric"),
        _weights(4, symmetric=False, served=True),
        *("32, 64, 128, a row", "yes", _PADDED, "NVIDIA GPUs: Marlin with zero points, from Turing on"),
        MARLIN,
    ),
    Row(
        *("vLLM", "compressed-tensors", "2, 3, 5, 6 bits; 8 asymmetric"),
        lambda scheme: (
            _weights(2, 3, 5, 6, symmetric=None, served=True)(scheme)
            or _weights(8, symmetric=False, served=True)(scheme)
        ),
        *("32, 64, 128, a row", "yes", "any", "NVIDIA GPUs from Turing on, with the package humming; columns in order"),
        f"{HUMMING}; [vllm#46389](https://github.com/vllm-project/vllm/pull/46389)",
    ),
    Row(
        *("vLLM", "compressed-tensors", "8 bits, int8 inputs (W8A8)"),
        _w8a8,
        *("a row", "yes", "any", "compute capability 7.5 to 9.0: not on Blackwell (10.0 and up)"),
        f"[INT8 W8A8]({VLLM_DOCS}/int8/)",
    ),
    Row(
        *("vLLM on a CPU", "compressed-tensors", "4 bits"),
        _weights(4, symmetric=None),
        *("even ones, a row", "yes", "rows and columns divide by 32"),
        "float16, or bfloat16; where AMX is, bfloat16 rounds inputs to 8 bits and does not take a scale a row",
        SERVING,
        _by_32,
    ),
    Row(
        *("vLLM on a CPU", "compressed-tensors", "8 bits, int8 inputs (W8A8)"),
        _w8a8,
        *("a row", "yes", "any", "where AMX is, bfloat16 only: float16 ends the process"),
        SERVING,
    ),
    Row(
        *("transformers", "gptq", "2, 3, 4, 8 bits"),
        _weights(2, 3, 4, 8, symmetric=None),
        *("any that divides", "no", "rows and columns divide by 32", "needs optimum and GPTQModel"),
        LOADERS,
        _by_32,
    ),
    Row(
        *("GPTQModel", "gptq", "2, 3, 4, 8 bits"),
        _weights(2, 3, 4, 8, symmetric=None),
        *("any that divides", "no", "rows and columns divide by 32", "reads `gptq` (v1) and `gptq_v2`"),
        LOADERS,
        _by_32,
    ),
    Row(
        *("auto-gptq 0.7.1", "gptq", "2, 3, 4, 8 bits symmetric"),
        _weights(2, 3, 4, 8),
        *("any that divides", "no", "rows and columns divide by 32", "transformers 4.40; reads `gptq` (v1) only"),
        LOADERS,
        _by_32,
    ),
    Row(
        *("vLLM", "gptq", "4, 8 bits symmetric; no others"),
        _weights(4, 8, served=True),
        *("32, 64, 128, a row", "no", _PADDED, "NVIDIA GPUs: Marlin from Turing on"),
        AUTO_GPTQ,
    ),
    Row(
        *("vLLM on a CPU", "gptq", "4 bits symmetric"),
        _weights(4, served=True),
        *("32, 64, 128, a row", "no", "rows and columns divide by 32", "as 4 bits in `compressed-tensors`"),
        SERVING,
        _by_32,
    ),
    Row(
        *("transformers", "bitsandbytes", "nf4, fp4"),
        _floats,
        *("64", "no", "columns divide by the group", "CPU and CUDA; 0.50 or newer tested on the CPU"),
        f"{TESTS}test_bitsandbytes.py",
    ),
    Row(
        *(BNB_ON_AVX512, "bitsandbytes", "nf4, fp4"),
        _floats,
        *("64", "no", "rows divide by 32", "computes in bfloat16; other rows stop the first forward (0.50)"),
        f"{TESTS}test_bitsandbytes.py",
        lambda rows, columns: rows % 32 == 0,
    ),
    Row(
        *("transformers", "bitsandbytes", "LLM.int8"),
        _llm_int8,
        *("a row", "no", "any", "CPU and CUDA; 0.50 or newer tested on the CPU"),
        f"{TESTS}test_bitsandbytes.py",
    ),
    Row(
        *("vLLM, vLLM on a CPU", "bitsandbytes", "none: no method of 0.32.0, as it was of earlier ones"),
        _none,
        *("none", "no", "none", "refused while the config is read"),
        f"{METHODS}; {SERVING}",
    ),
    Row(
        *("llama.cpp", "gguf", "up to 5 bits; 6, 8 bits symmetric"),
        _blocks_of_32,
        *(
            "multiples of 32",
            "yes",
            "columns divide by 32",
            f"{', '.join(KINDS)}; 2 and 3 bits take 4, 6 take 8",
        ),
        LOADERS,
        lambda rows, columns: columns % 32 == 0,
    ),
    Row(
        *("transformers", "gguf", "the same"),
        _blocks_of_32,
        *("multiples of 32", "yes", "columns divide by 32", "unpacks while loading"),
        f"{TESTS}test_gguf.py",
        lambda rows, columns: columns % 32 == 0,
    ),
    Row(
        *("vLLM", "gguf", "the same"),
        _blocks_of_32,
        *("multiples of 32", "yes", "columns divide by 32"),
        "GPUs, with vllm-gguf-plugin: 0.32.0 itself has no such method, and the plugin (0.0.5) needs CUDA",
        METHODS,
        lambda rows, columns: columns % 32 == 0,
    ),
    Row(
        *("llama.cpp", "gguf", "K-quants: 2 to 6 bits"),
        _k_quant,
        *("16, or 32 of 4 and 5 bits", "yes", "columns divide by 256", "Q2_K, Q3_K, Q4_K, Q5_K, Q6_K"),
        LOADERS,
        _by_256,
    ),
    Row(
        *("transformers", "gguf", "K-quants: 2 to 6 bits"),
        _k_quant,
        *("16, or 32 of 4 and 5 bits", "yes", "columns divide by 256", "unpacks while loading"),
        f"{TESTS}test_gguf.py",
        _by_256,
    ),
    Row(
        *("vLLM", "gguf", "K-quants: 2 to 6 bits"),
        _k_quant,
        *("16, or 32 of 4 and 5 bits", "yes", "columns divide by 256", "as the other types"),
        METHODS,
        _by_256,
    ),
    Row(
        *("transformers, vLLM, vLLM on a CPU", "plain", "values written out"),
        lambda scheme: scheme.inputs is None,
        *("any", "yes", "any", "no memory saved; integer inputs are lost"),
        f"tested here: tests/test_architecture.py; {SERVING}",
    ),
)


def rows_of(runtime: str, format_name: str) -> list[Row]:
    """The rows of one runtime and format. vLLM and vLLM on a CPU are two runtimes."""
    return [row for row in SUPPORT if runtime in row.runtime.split(", ") and row.format == format_name]


def unserved(runtime: str, format_name: str, schemes: Mapping[str, Scheme], shapes: Shapes) -> list[str]:
    """What a runtime does not serve of a model, by its rows: kinds of schemes, and linears with shapes that no kernel
    takes. Empty where the runtime has no row for the format: nothing is known then."""
    rows = rows_of(runtime, format_name)
    if not rows:
        return []
    unknown: dict[str, int] = {}
    unfit: dict[str, list[str]] = {}
    for module, scheme in schemes.items():
        taking = [row for row in rows if row.takes(scheme)]
        if not taking:
            unknown[scheme.label] = unknown.get(scheme.label, 0) + 1
        elif not any(row.fits(*shapes[module]) for row in taking):
            unfit.setdefault(taking[0].shapes, []).append(module)
    found = [
        f"{runtime} is not known to serve {label} in {format_name} ({count} linears); docs/formats.md has what it does"
        for label, count in unknown.items()
    ]
    for rule, modules in unfit.items():
        rows_, columns = shapes[modules[0]]
        found.append(
            f"{runtime}'s kernels want that {rule}; {len(modules)} linears do not fit, {modules[0]} with {rows_} rows "
            f"and {columns} columns among them"
        )
    return found


def limits_of(runtime: str, format_name: str, schemes: Mapping[str, Scheme]) -> list[str]:
    """What a runtime's rows say beside: devices that do not run such schemes."""
    used = set(schemes.values())
    return [
        f"{runtime} serves {row.what} on {row.limits}"
        for row in rows_of(runtime, format_name)
        if row.takes is _w8a8 and any(map(row.takes, used))
    ]
