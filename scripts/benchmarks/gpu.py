"""`compress run` on a GPU, from folder to published artifact: a Llama-3.1-8B's shape with random weights.

    python scripts/benchmarks/gpu.py --tokenizer FOLDER [--work DIR] [--blocks 32] [--windows 128]
        [--window-tokens 2048] [--quality balanced] [--low-memory] [--small] [--keep] [--out FILE] [--kernels]

Writes the model (tensor by tensor, on the GPU), text of random words and a recipe to DIR, runs the command as a user
would, and prints where its seconds went, peak memory, and the floor: the arithmetic of each part over the rate that a
large matrix product reaches on this very card. Evaluation is two short windows, so that nearly all that is left is
reading, compressing, packing, hashing and publishing. --kernels times the parts of one block alone; --small takes a
tiny model, two blocks and little text unless told otherwise, to try the script on a CPU. FOLDER is any model folder
with a tokenizer, such as .cache/glass.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import string
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from compress.calibration.statistics import product
from compress.quantization.columns import solve_columns
from compress.quantization.factor import factorise
from compress.quantization.gptq import choose_grid, energy, solve
from compress.quantization.gpu import fine_product
from compress.quantization.refine import Split, _solved, descended, fitted_scales, moments, refined
from compress.quantization.scheme import Scheme
from compress.quantization.target_shift import Mismatch, cholesky_, targets_of

sys.path.insert(0, str(Path(__file__).parent))
from random_model import parser as model_parser
from random_model import write_model

LLAMA_8B = {"hidden": 4096, "inner": 14336, "heads": 32, "kv-heads": 8, "vocabulary": 128256}
FULL = {"blocks": 32, "windows": 128, "window_tokens": 2048}
SMALL = {"hidden": 128, "inner": 384, "heads": 4, "kv-heads": 2, "vocabulary": 1024}


def texts_of(words: int, seed: str) -> list[str]:
    """Texts of made-up words, some much more frequent than others."""
    draw = random.Random(seed)
    known = ["".join(draw.choices(string.ascii_lowercase, k=draw.randint(2, 9))) for _ in range(4000)]
    chosen = draw.choices(known, [1 / (rank + 10) for rank in range(len(known))], k=words)
    return [" ".join(chosen[start : start + 400]).capitalize() + "." for start in range(0, words, 400)]


def recipe_of(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """The recipe: 4 bits, symmetric, groups of 64."""
    stage = {"kind": "gptq", "bits": 4, "group_size": 64, "quality": arguments.quality}
    if arguments.low_memory:
        stage["low_memory"] = True
    return {
        "schema": 1,
        "name": "llama-8b-shape",
        "seed": 0,
        "model": {"path": str(folder / "model"), "max_perplexity": 1e9},
        "calibration": {
            "data": {"kind": "files", "paths": ["calibration.jsonl"]},
            "windows": arguments.windows,
            "window_tokens": arguments.window_tokens,
        },
        "evaluation": [
            {
                "kind": "perplexity",
                "set": "held-out",
                "data": {"kind": "files", "paths": ["held-out.jsonl"]},
                "windows": 2,
                "window_tokens": 64,
            }
        ],
        "stages": [stage],
        "gates": [{"kind": "events", "event": "rounding_fallback"}],
        "export": {"format": "compressed-tensors"},
    }


def prepare(folder: Path, arguments: argparse.Namespace) -> None:
    shape = SMALL if arguments.small else LLAMA_8B
    device = "cuda" if torch.cuda.is_available() else "cpu"
    given = [str(folder / "model"), "--tokenizer", str(arguments.tokenizer), "--blocks", str(arguments.blocks)]
    given += [part for name, value in shape.items() for part in (f"--{name}", str(value))]
    started = time.perf_counter()
    parameters, total = write_model(
        model_parser().parse_args([*given, "--device", device, "--shard-bytes", str(4 * 10**9)])
    )
    for name, words in (("calibration", arguments.windows * arguments.window_tokens), ("held-out", 4000)):
        lines = (json.dumps({"text": text}) for text in texts_of(words, name))
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe_of(folder, arguments)), encoding="utf-8")
    print(f"model: {parameters:,} parameters, {total:,} bytes, {time.perf_counter() - started:.1f} s", flush=True)


def run(folder: Path) -> tuple[dict[str, Any], float]:
    """The report of the run, and its wall clock with Python's start."""
    environment = {**os.environ, "COMPRESS_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "compress", "run", "recipe.yaml", "--store", str(folder / "store"), "--json"]
    root = str(Path(__file__).resolve().parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    started = time.perf_counter()
    ended = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)
    seconds = time.perf_counter() - started
    if ended.returncode not in (0, 4):
        raise SystemExit(f"the run ended with {ended.returncode}")
    return json.loads(ended.stdout), seconds


def timed(work: Callable[[], Any], repeat: int = 3) -> float:
    """Median seconds of one call on the GPU, after one to warm up."""
    work()
    torch.cuda.synchronize()
    found = []
    for _ in range(repeat):
        started = time.perf_counter()
        work()
        torch.cuda.synchronize()
        found.append(time.perf_counter() - started)
    return sorted(found)[len(found) // 2]


def roofs() -> dict[str, float]:
    """Operations a second of large products on this card, by arithmetic, and bytes a second of a copy."""
    found = {}
    for name, dtype, size in (
        ("bfloat16", torch.bfloat16, 8192),
        ("float32", torch.float32, 8192),
        ("float64", torch.float64, 8192),
    ):
        left = torch.randn(size, size, device="cuda", dtype=dtype)
        found[name] = 2 * size**3 / timed(lambda left=left: left @ left)
    torch.set_float32_matmul_precision("high")
    left = torch.randn(8192, 8192, device="cuda")
    found["tf32"] = 2 * 8192**3 / timed(lambda: left @ left)
    torch.set_float32_matmul_precision("highest")
    source = torch.empty(1 << 31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    found["copy"] = 2 * source.numel() / timed(lambda: target.copy_(source))
    return found


def floor_of(arguments: argparse.Namespace, rates: dict[str, float]) -> dict[str, float]:
    """Seconds that the arithmetic of each part takes at this card's rates, `balanced`, all blocks."""
    shape = SMALL if arguments.small else LLAMA_8B
    hidden, inner = shape["hidden"], shape["inner"]
    keys = hidden // shape["heads"] * shape["kv-heads"]
    tokens, blocks = arguments.windows * arguments.window_tokens, arguments.blocks
    weights = 2 * hidden * hidden + 2 * hidden * keys + 3 * hidden * inner
    streams = 1.5 if arguments.quality == "balanced" else 1.0
    squares = 3 * hidden**2 + inner**2
    cubes = 3 * hidden**3 + inner**3
    costs = (hidden + 2 * keys) * hidden**2 + hidden**3 + 2 * inner * hidden**2 + hidden * inner**2
    attention = 2 * tokens * arguments.window_tokens * hidden
    moments = 0.5 * squares + (streams - 1) * (squares + hidden * (hidden + inner))
    return {
        "forward": blocks * streams * (2 * tokens * weights + attention) / rates["bfloat16"],
        "hessian": blocks * 2 * tokens * moments / rates["bfloat16"],
        "factorise": blocks * 4 * cubes / rates["float64"],
        "solve": blocks * (costs / rates["float32"] + 20 * costs / rates["tf32"]),
    }


def kernels() -> list[tuple[str, float, float, str]]:
    """(part, seconds, operations or weights a second, unit) of one 8B block's parts, each alone."""
    return [row for outputs, columns in ((28672, 4096), (4096, 14336)) for row in _kernels(outputs, columns)]


def _kernels(outputs: int, columns: int) -> Iterator[tuple[str, float, float, str]]:
    label, cost = f"{outputs} x {columns}", outputs * columns**2
    inputs = torch.randn(16384, columns, device="cuda", dtype=torch.bfloat16)
    spent = timed(partial(product, inputs, inputs))
    yield f"Gram, {columns} columns, 16384 tokens", spent, 2 * len(inputs) * columns**2 / spent, "FLOP/s"
    mixed = torch.randn(2 * columns, columns, device="cuda")
    hessian = (mixed.T @ mixed).double() / len(mixed)
    spent = timed(partial(factorise, hessian, 0.01))
    yield f"factorise {columns}", spent, columns**3 * 2 / 3 / spent, "FLOP/s"
    spent = timed(lambda: cholesky_(hessian.clone()))
    yield f"Cholesky {columns}", spent, columns**3 / 3 / spent, "FLOP/s"
    unshifted, hidden = torch.randn(outputs, columns, device="cuda"), 4096
    residual = torch.randn(hidden, columns, device="cuda", dtype=torch.float64) if outputs == hidden else None
    spent = timed(
        lambda: targets_of(Mismatch(hessian.clone(), hessian.clone(), residual, 10**6), [unshifted], 0.5, 0.5)
    )
    rows = min(outputs, columns)
    yield f"targets {label}", spent, (columns**3 / 3 + 2 * rows * columns**2) / spent, "FLOP/s"
    factor = factorise(hessian, 0.01)
    assert factor is not None
    weight, scheme, single = torch.randn(outputs, columns, device="cuda"), Scheme(4, True, 64), hessian.float()
    search = partial(choose_grid, weight, factor.pivots, scheme, torch.bfloat16, "weighted")
    spent = timed(search)
    yield f"scale search {label}", spent, weight.numel() / spent, "weights/s"
    grid = search()
    loop = partial(solve_columns, weight, factor.order, factor.upper, grid)
    spent = timed(loop)
    yield f"column loop {label}", spent, cost / spent, "FLOP/s"
    codes = loop()
    integers = codes.to(torch.int16).view(outputs, -1, 64)
    spent = timed(partial(moments, integers, single))
    yield f"moments {label}", spent, cost / spent, "FLOP/s"
    found = moments(integers, single)
    found.diagonal(dim1=1, dim2=2).add_(1)
    slopes = torch.randn(outputs, columns // 64, device="cuda")
    spent = timed(partial(torch.linalg.cholesky_ex, found))
    yield f"Cholesky of rows {label}", spent, outputs * (columns // 64) ** 3 / 3 / spent, "FLOP/s"
    spent = timed(partial(_solved, found, slopes))
    yield f"with solving {label}", spent, outputs * (columns // 64) ** 3 / 3 / spent, "FLOP/s"
    del found, slopes
    spent = timed(partial(fine_product, weight, single))
    yield f"fine product {label}", spent, 2 * cost / spent, "FLOP/s"
    spent = timed(partial(descended, weight, codes, grid, single))
    yield f"sweep {label}", spent, 3 * cost / spent, "FLOP/s"
    spent = timed(partial(fitted_scales, weight, codes, grid, single))
    yield f"fit of scales {label}", spent, 5 * cost / spent, "FLOP/s"
    spent = timed(partial(refined, weight, codes, grid, single))
    yield f"refinement {label}", spent, 13 * cost / spent, "FLOP/s"
    split = Split(single, single)
    spent = timed(partial(solve, [weight], hessian.float(), factor, scheme, torch.bfloat16, "weighted", split))
    yield f"solve {label}", spent, cost / spent, "FLOP/s"
    spent = timed(partial(energy, weight, single))
    yield f"error {label}", spent, 2 * cost / spent, "FLOP/s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("/dev/shm/compress-gpu"))
    parser.add_argument("--blocks", type=int)
    parser.add_argument("--windows", type=int)
    parser.add_argument("--window-tokens", type=int)
    parser.add_argument("--quality", default="balanced")
    parser.add_argument("--low-memory", action="store_true")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--kernels", action="store_true")
    parser.add_argument("--keep", action="store_true", help="reuse the model that is in DIR, and leave it there")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    usual = {"blocks": 2, "windows": 16, "window_tokens": 128} if arguments.small else dict(FULL)
    for name, value in usual.items():
        setattr(arguments, name, getattr(arguments, name) or value)
    gpu = torch.cuda.is_available()
    print(f"{torch.cuda.get_device_name() if gpu else 'no GPU'}, torch {torch.__version__}, {os.cpu_count()} cores")
    if arguments.kernels:
        for name, rate in roofs().items():
            print(f"roof {name:10} {rate / 1e12:8.1f} T/s", flush=True)
        for name, seconds, rate, unit in kernels():
            print(f"{name:44} {seconds * 1e3:9.2f} ms {rate / 1e12:8.2f} T{unit}", flush=True)
        return
    folder = arguments.work
    if arguments.keep and (folder / "model" / "config.json").is_file():
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe_of(folder, arguments)), encoding="utf-8")
        for left in ("cache", "store"):
            shutil.rmtree(folder / left, ignore_errors=True)
    else:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        prepare(folder, arguments)
    report, seconds = run(folder)
    (stage,) = report["stages"]
    rates = roofs() if gpu else {}
    floor = floor_of(arguments, rates) if gpu else {}
    print(f"whole command {seconds:.1f} s")
    for step, spent in report["seconds_by_step"].items():
        print(f"  {step:24} {spent:8.1f} s")
    for part, spent in stage["seconds_by_part"].items():
        share = f", floor {floor[part]:.1f} s, {100 * floor[part] / spent:.0f} %" if part in floor and spent else ""
        print(f"    {part:22} {spent:8.1f} s{share}")
    memory = report["memory"]
    print(f"peak device {memory['peak_device']}, peak host {memory['peak_host']}")
    print("events", report["event_counts"])
    if arguments.out:
        kept = {key: report[key] for key in ("seconds_by_step", "event_counts", "memory", "provenance")}
        kept |= {"stage_seconds": stage["seconds_by_part"], "whole_command": seconds, "roofs": rates, "floor": floor}
        arguments.out.write_text(json.dumps({"arguments": vars(arguments), **kept}, indent=1, default=str) + "\n")
    if not arguments.keep:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
