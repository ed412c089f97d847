"""What each runtime serves of each format: one table, which `plan` warns by and docs/formats.md shows.

A row is about one kind of scheme. `source` says where it is from: a test of ours, a recorded run of a loader
(`make loaders`, docs/benchmarks/loaders.md), or what the runtime's own documentation or code says (read in 2026-11).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from compress.checkpoints.formats.base import Shapes
from compress.quantization.scheme import Scheme

VLLM = "https://github.com/vllm-project/vllm/blob/main/vllm/model_executor/layers/quantization"
VLLM_DOCS = "https://docs.vllm.ai/en/latest/features/quantization"
MARLIN = f"{VLLM}/utils/marlin_utils.py"
TESTS = "tested here: tests/checkpoints/"
LOADERS = "run here: docs/benchmarks/loaders.md"
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
        return plain and suits and (not served or scheme.group_size in SERVED_GROUPS)

    return takes


def _floats(scheme: Scheme) -> bool:
    return scheme.grid != "int"


def _w8a8(scheme: Scheme) -> bool:
    return scheme.inputs is not None and scheme.outliers is None


def _llm_int8(scheme: Scheme) -> bool:
    return scheme.outliers is not None


def _marlin_fits(rows: int, columns: int) -> bool:
    return rows % 64 == 0 and columns % 128 == 0


def _by_32(rows: int, columns: int) -> bool:
    return rows % 32 == 0 and columns % 32 == 0


BNB_ON_AVX512 = "bitsandbytes on CPUs with AVX512-BF16"
_MARLIN_SHAPES = "rows divide by 64, columns by 128, after tensor parallelism has split them"

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
        *("32, 64, 128, a row", "yes", _MARLIN_SHAPES, "Marlin from Ampere on; Machete on Hopper"),
        f"[marlin_utils.py]({MARLIN})",
        _marlin_fits,
    ),
    Row(
        *("vLLM", "compressed-tensors", "2, 3, 5, 6 bits symmetric"),
        _weights(2, 3, 5, 6, served=True),
        *("32, 64, 128, a row", "yes", "any", "Humming; columns in order"),
        "[vllm#46389](https://github.com/vllm-project/vllm/pull/46389)",
    ),
    Row(
        *("vLLM", "compressed-tensors", "4, 8 bits asymmetric"),
        _weights(4, 8, symmetric=False, served=True),
        *("32, 64, 128, a row", "yes", _MARLIN_SHAPES, "Marlin with zero points"),
        f"[marlin_utils.py]({MARLIN})",
        _marlin_fits,
    ),
    Row(
        *("vLLM", "compressed-tensors", "8 bits, int8 inputs (W8A8)"),
        _w8a8,
        *("a row", "yes", "any", "compute capability 7.5 to 9.0: not on Blackwell (10.0 and up)"),
        f"[INT8 W8A8]({VLLM_DOCS}/int8/)",
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
        *("vLLM", "gptq", "4, 8 bits symmetric"),
        _weights(4, 8, served=True),
        *("32, 64, 128, a row", "no", _MARLIN_SHAPES, "Marlin from Ampere on"),
        f"[marlin_utils.py]({MARLIN})",
        _marlin_fits,
    ),
    Row(
        *("vLLM", "gptq", "2, 3 bits symmetric; 2, 3, 4, 8 asymmetric"),
        lambda scheme: _weights(2, 3)(scheme) or _weights(2, 3, 4, 8, symmetric=False)(scheme),
        *(
            "any that divides",
            "no",
            "rows and columns divide by 32",
            "the older kernel; zero points of `gptq_v2`: #26092",
        ),
        "[vllm#26092](https://github.com/vllm-project/vllm/pull/26092)",
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
        *("vLLM", "bitsandbytes", "nf4, fp4, LLM.int8"),
        lambda scheme: _floats(scheme) or _llm_int8(scheme),
        *("64", "no", "any", "NVIDIA GPUs; slower than Marlin"),
        f"[bitsandbytes]({VLLM_DOCS}/bnb/)",
    ),
    Row(
        *("llama.cpp", "gguf", "up to 5 bits; 6, 8 bits symmetric"),
        lambda scheme: _weights(2, 3, 4, 5, symmetric=None)(scheme) or _weights(6, 8)(scheme),
        *(
            "multiples of 32",
            "yes",
            "columns divide by 32",
            "llama, mistral, qwen2, qwen3; 2 and 3 bits take 4, 6 take 8",
        ),
        LOADERS,
        lambda rows, columns: columns % 32 == 0,
    ),
    Row(
        *("transformers", "gguf", "the same"),
        lambda scheme: _weights(2, 3, 4, 5, symmetric=None)(scheme) or _weights(6, 8)(scheme),
        *("multiples of 32", "yes", "columns divide by 32", "unpacks while loading"),
        f"{TESTS}test_gguf.py",
        lambda rows, columns: columns % 32 == 0,
    ),
    Row(
        *("vLLM", "gguf", "the same"),
        lambda scheme: _weights(2, 3, 4, 5, symmetric=None)(scheme) or _weights(6, 8)(scheme),
        *("multiples of 32", "yes", "columns divide by 32", "vLLM calls it highly experimental"),
        f"[GGUF]({VLLM_DOCS}/gguf/)",
        lambda rows, columns: columns % 32 == 0,
    ),
    Row(
        *("transformers, vLLM", "plain", "values written out"),
        lambda scheme: scheme.inputs is None,
        *("any", "yes", "any", "no memory saved; integer inputs are lost"),
        "tested here: tests/test_architecture.py",
    ),
)


def unserved(runtime: str, format_name: str, schemes: Mapping[str, Scheme], shapes: Shapes) -> list[str]:
    """What a runtime does not serve of a model, by its rows: kinds of schemes, and linears with shapes that no kernel
    takes. Empty where the runtime has no row for the format: nothing is known then."""
    rows = [row for row in SUPPORT if runtime in row.runtime and row.format == format_name]
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
        for row in SUPPORT
        if runtime in row.runtime and row.format == format_name and row.takes is _w8a8 and any(map(row.takes, used))
    ]
