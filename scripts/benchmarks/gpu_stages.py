"""Every kind of stage and every format once, on the small model `glass`, on whatever device there is.

    python scripts/benchmarks/gpu_stages.py --glass FOLDER [--work DIR] [--only NAME ...] [--device auto]

Prints a line for each: exit code, mean KL to the source, how far the public loader is from our own reading, seconds.
Run it on a GPU and on a CPU and compare: the arithmetic differs, the numbers should hardly. `bf16-` is the same model
in bfloat16, which a GPU computes in.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml

INT4 = {"kind": "gptq", "bits": 4, "group_size": 32, "overrides": [{"match": "*.down_proj", "group_size": "channel"}]}
INT8 = {"kind": "gptq", "bits": 8, "group_size": "channel", "inputs": "int8"}
WIDE = ["*.gate_proj", "*.up_proj", "*.down_proj"]
"""Its 341 rows or columns are no multiple of 32."""
RUNS: dict[str, tuple[list[dict[str, Any]], str]] = {
    "rounding": ([{**INT4, "kind": "round_to_nearest"}], "compressed-tensors"),
    "gptq": ([INT4], "compressed-tensors"),
    "bf16-gptq": ([INT4], "compressed-tensors"),
    "bf16-gptq-low-memory": ([{**INT4, "low_memory": True}], "compressed-tensors"),
    "gptq-max": ([{**INT4, "quality": "max"}], "compressed-tensors"),
    "w8a8": ([{"kind": "smoothquant"}, INT8], "compressed-tensors"),
    "bf16-w8a8": ([INT8], "compressed-tensors"),
    "gptq-layout": ([{"kind": "gptq", "bits": 4, "group_size": 32, "ignore": WIDE}], "gptq"),
    "gguf": ([{"kind": "gptq", "bits": 4, "group_size": 32, "ignore": WIDE}], "gguf"),
    "nf4": ([{"kind": "bitsandbytes", "ignore": WIDE}], "bitsandbytes"),
    "llm-int8": ([{"kind": "bitsandbytes", "type": "int8"}], "bitsandbytes"),
    "recover": ([INT4, {"kind": "recover", "epochs": 1}], "compressed-tensors"),
    "bf16-recover": ([INT4, {"kind": "recover", "epochs": 1}], "compressed-tensors"),
    "prune": ([{"kind": "structured_prune", "target": {"ratio": 0.1}, "parts": ["mlp"]}], "plain"),
    "sparse": ([{"kind": "sparsify", "pattern": "2:4", "ignore": ["*.down_proj"]}], "plain"),
    "mixed": (
        [
            {"kind": "mixed_precision", "budget": {"effective_bits": 5.0}, "group_size": 32, "ignore": WIDE},
            {"kind": "gptq", "bits": "planned"},
        ],
        "compressed-tensors",
    ),
    "kv-cache": ([INT4, {"kind": "kv_cache"}], "compressed-tensors"),
    "awq": ([{"kind": "awq"}, {**INT4, "kind": "round_to_nearest"}], "compressed-tensors"),
}


def texts(glass: Path, folder: Path) -> None:
    """What glass writes itself, from two seeds."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(glass)
    model = AutoModelForCausalLM.from_pretrained(glass, dtype=torch.float32).eval()
    for name, seed, count in (("calibration", 1, 96), ("evaluation", 2, 48)):
        torch.manual_seed(seed)
        start = torch.full((count, 1), tokenizer.bos_token_id)
        with torch.no_grad():
            ids = model.generate(start, do_sample=True, top_k=0, max_length=128, pad_token_id=tokenizer.pad_token_id)
        lines = [json.dumps({"text": text}) for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def in_bfloat16(glass: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(glass, dtype=torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(glass / name, folder / name)


def run(name: str, folder: Path, device: str) -> str:
    """One run; what it came to, in a line."""
    from compress.cli.app import guarded

    stages, format_ = RUNS[name]
    held_out = {"set": "held-out", "data": {"kind": "files", "paths": [str(folder / "evaluation.jsonl")]}}
    held_out |= {"windows": 8, "window_tokens": 128}
    recipe = {
        "schema": 1,
        "name": name,
        "seed": 0,
        "model": {"path": str(folder / ("bf16" if name.startswith("bf16") else "glass")), "device": device},
        "calibration": {
            "data": {"kind": "files", "paths": [str(folder / "calibration.jsonl")]},
            "windows": 24,
            "window_tokens": 128,
        },
        "stages": stages,
        "export": {"format": format_, "context": 128},
        "evaluation": [{"kind": "perplexity", **held_out}, {"kind": "divergence", **held_out}],
        "gates": [{"kind": "threshold", "measure": "divergence.held-out.mean_kl", "max": 1.0}],
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    out, err, started = io.StringIO(), io.StringIO(), time.perf_counter()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = guarded(["run", str(path), "--store", str(folder / "store"), "--json"])
    seconds = time.perf_counter() - started
    if code not in (0, 3, 4):
        wrong = [line for line in err.getvalue().splitlines() if line.strip()]
        return f"exit {int(code)} {seconds:6.1f} s  {' | '.join(wrong[-3:])[-300:]}"
    report = json.loads(out.getvalue())
    kl = report["measurements"]["compressed"]["divergence.held-out.mean_kl"]
    trip = report["round_trip"] or {}
    kinds = ", ".join(f"{kind} {count}" for kind, count in report["event_counts"].items() if count)
    return f"exit {int(code)} {seconds:6.1f} s  KL {kl:.5f}  loader {trip.get('mean_kl', float('nan')):.1e}  {kinds}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--glass", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("/tmp/compress-stages"))
    parser.add_argument("--only", nargs="*", choices=sorted(RUNS), default=list(RUNS))
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    shutil.rmtree(arguments.work, ignore_errors=True)
    arguments.work.mkdir(parents=True)
    os.environ |= {"COMPRESS_CACHE": str(arguments.work / "cache"), "HF_HUB_OFFLINE": "1"}
    name = torch.cuda.get_device_name() if torch.cuda.is_available() and arguments.device != "cpu" else "CPU"
    print(f"{name}, torch {torch.__version__}", flush=True)
    texts(arguments.glass, arguments.work)
    shutil.copytree(arguments.glass, arguments.work / "glass")
    in_bfloat16(arguments.glass, arguments.work / "bf16")
    for each in arguments.only:
        print(f"{each:22} {run(each, arguments.work, arguments.device)}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
