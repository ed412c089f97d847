"""Load what we write with the loaders that users have, each in an environment of its own, and compare.

    make loaders        or: python scripts/loaders/run.py [--recipe recipes/quickstart.yaml] [--out FILE.json]

Makes an artifact in the `gptq` format by the recipe, and a `gguf` one from it, in .loaders/; builds the environments
there on first use (GPTQModel brings a CUDA build of torch: several GB; llama-cpp-python is compiled: ten minutes).
Every loader computes logits of the same windows, and ours are those of `compress` reading the same files. Recorded:
mean KL from ours to the loader's, the largest difference, the perplexities' ratio, and for llama.cpp whether its
tokenizer gives the same ids and its greedy text is the same as transformers'.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
import venv
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
PLACE = ROOT / ".loaders"
WINDOWS, TOKENS, PROMPT, GREEDY = 4, 256, 24, 32


@dataclass(frozen=True)
class Loader:
    """An environment (pip's steps, in order), its worker and the format it is given."""

    name: str
    format: str
    worker: str
    installs: tuple[tuple[str, ...], ...]
    versions: tuple[str, ...]

    @property
    def python(self) -> Path:
        return PLACE / self.name / "bin" / "python"


LOADERS = (
    Loader(
        "gptqmodel",
        "gptq",
        "gptqmodel_worker.py",
        (("gptqmodel==7.7.0", "optimum==2.3.0", "accelerate"),),
        ("gptqmodel", "optimum", "transformers", "torch"),
    ),
    Loader(
        "autogptq",
        "gptq",
        "autogptq_worker.py",
        (
            ("torch==2.13.0",),
            ("--no-deps", "auto-gptq==0.7.1"),
            ("transformers==4.40.2", "accelerate<1", "peft==0.10.0", "safetensors", "sentencepiece", "numpy", "rouge"),
            ("gekko", "datasets", "tqdm", "threadpoolctl"),
        ),
        ("auto-gptq", "transformers", "torch"),
    ),
    Loader(
        "llamacpp", "gguf", "llamacpp_worker.py", (("llama-cpp-python==0.3.36", "safetensors"),), ("llama-cpp-python",)
    ),
)


def build(loader: Loader) -> None:
    """Create a loader's environment unless a stamp says that these very installs were done."""
    stamp, wanted = PLACE / loader.name / "installed.json", json.dumps(loader.installs)
    if stamp.is_file() and stamp.read_text() == wanted:
        return
    print(f"building {loader.name} in {stamp.parent}", flush=True)
    if not loader.python.exists():
        venv.create(stamp.parent, with_pip=True, symlinks=True)
    # Built for the machine itself, llama.cpp was seen to end with an illegal instruction (AMX on a virtual machine).
    environment = {"CMAKE_ARGS": "-DGGML_NATIVE=OFF", **os.environ}
    for step in loader.installs:
        subprocess.run([loader.python, "-m", "pip", "install", "--quiet", *step], check=True, env=environment)
    stamp.write_text(wanted)


def compress(*arguments: str) -> dict[str, Any]:
    """Run a command of ours; returns its JSON document."""
    command = [sys.executable, "-m", "compress", *arguments, "--store", str(PLACE / "store"), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} ended with {done.returncode}: {done.stdout[-2000:]}")
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def make(recipe: str) -> dict[str, Path]:
    """The artifact in each format; the second is made from the first."""
    first = compress("run", recipe, "--set", "export.format=gptq")["artifact"]
    second = compress("export", f"{first['name']}@{first['version']}", "--format", "gguf")["artifact"]
    return {"gptq": Path(first["path"]) / "model", "gguf": Path(second["path"]) / "model"}


def windows_of(folder: Path) -> Tensor:
    """Token ids (windows, tokens) of Python's docstrings, which no shipped recipe calibrates on."""
    from transformers import AutoTokenizer

    from compress.calibration.window_specs import WindowSpec
    from compress.calibration.windows import build_windows

    spec = WindowSpec(data="python-docstrings", windows=WINDOWS, window_tokens=TOKENS)
    return build_windows(spec, ROOT, AutoTokenizer.from_pretrained(folder), 1, "loaders").ids


def ours(folder: Path, ids: Tensor) -> Tensor:
    """Logits float32 (windows, tokens, vocabulary) of the files as `compress` reads them."""
    from compress.calibration.windows import Windows, digest_of
    from compress.checkpoints.reader import Checkpoint
    from compress.checkpoints.skeleton import Skeleton
    from compress.evaluation.measure import walk_states
    from compress.events import Quiet

    cpu, sets = torch.device("cpu"), {"set": Windows(ids, None, {"digest": digest_of(ids, None)})}
    checkpoint = Checkpoint(folder)
    states = walk_states(checkpoint, sets, cpu, torch.float32, TOKENS, Quiet(), "")["set"]
    with Skeleton(checkpoint.config, cpu, torch.float32).head(checkpoint) as head:
        return torch.stack([head.logits(window) for window in states])


def greedy(folder: Path, prompt: Tensor) -> list[int]:
    """What transformers writes after the prompt."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = model.generate(prompt[None], max_new_tokens=GREEDY, min_new_tokens=GREEDY, do_sample=False)
    return [int(token) for token in found[0, len(prompt) :]]


def difference(expected: Tensor, found: Tensor, ids: Tensor) -> dict[str, float]:
    """How far a loader's logits are from ours."""
    log_p, log_q = expected.log_softmax(-1), found.float().log_softmax(-1)
    losses = [-log[:, :-1].gather(2, ids[:, 1:, None]).mean() for log in (log_p, log_q)]
    return {
        "mean_kl": float((log_p.exp() * (log_p - log_q)).sum(-1).mean()),
        "max_abs_logit_difference": float((expected - found).abs().max()),
        "top1_agreement": float((log_p.argmax(-1) == log_q.argmax(-1)).float().mean()),
        "perplexity_ratio": float((losses[1] - losses[0]).exp()),
    }


def run(loader: Loader, folder: Path, expected: Tensor, ids: Tensor) -> list[dict[str, Any]]:
    """Every result of one loader."""
    scratch = PLACE / f"{loader.name}.windows.safetensors"
    out = PLACE / f"{loader.name}.logits.safetensors"
    save_file({"input_ids": ids, "prompt": ids[0, :PROMPT].clone()}, scratch)
    model = folder / "model.gguf" if loader.format == "gguf" else folder
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    started = time.perf_counter()
    done = subprocess.run(
        [loader.python, Path(__file__).parent / loader.worker, model, scratch, out],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    versions = _versions(loader)
    if done.returncode or not out.is_file():
        return [{"loader": loader.name, "format": loader.format, "failed": done.returncode, "versions": versions}]
    tensors, rows = load_file(out), []
    for name, logits in tensors.items():
        if name != "greedy":
            row: dict[str, Any] = {"loader": name, "format": loader.format, **difference(expected, logits, ids)}
            rows.append({**row, "seconds": time.perf_counter() - started, "versions": versions})
    if "greedy" in tensors:
        rows[-1] |= _text(json.loads(done.stdout.splitlines()[-1]), tensors["greedy"].tolist(), folder, ids)
    out.unlink()
    return rows


def _text(said: dict[str, Any], written: list[int], folder: Path, ids: Tensor) -> dict[str, Any]:
    """Whether llama.cpp reads text as we do, and writes what transformers writes."""
    from transformers import AutoTokenizer

    from compress.checkpoints.sources import converted_gguf
    from compress.events import Quiet
    from compress.files import sha256_of

    tokens = AutoTokenizer.from_pretrained(folder)(said["text"], add_special_tokens=False)["input_ids"]
    path = folder / "model.gguf"
    theirs = greedy(converted_gguf(path, sha256_of(path), Quiet()), ids[0, :PROMPT])
    same = next((i for i, (a, b) in enumerate(zip(theirs, written, strict=True)) if a != b), len(written))
    return {
        "tokenizer_agrees": tokens == said["tokens"],
        "greedy_tokens_in_common": same,
        "greedy_tokens": len(written),
    }


def _versions(loader: Loader) -> dict[str, str]:
    code = f"from importlib.metadata import version; print(*[version(n) for n in {list(loader.versions)!r}])"
    done = subprocess.run([loader.python, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    return dict(zip(loader.versions, done.stdout.split(), strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="recipes/quickstart.yaml")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks" / "loaders.json")
    parser.add_argument("--only", action="append", choices=[loader.name for loader in LOADERS])
    parser.add_argument("--gptq", type=Path, help="a model folder in the gptq format, instead of making one")
    parser.add_argument("--gguf", type=Path, help="a folder with a model.gguf, instead of making one")
    arguments = parser.parse_args()
    PLACE.mkdir(exist_ok=True)
    given = arguments.gptq and arguments.gguf
    folders = {"gptq": arguments.gptq, "gguf": arguments.gguf} if given else make(arguments.recipe)
    ids = windows_of(folders["gptq"])
    expected = ours(folders["gptq"], ids)
    rows = []
    for loader in LOADERS:
        if arguments.only is None or loader.name in arguments.only:
            build(loader)
            rows += run(loader, folders[loader.format], expected, ids)
            print(json.dumps(rows[-1], indent=2), flush=True)
    machine = {
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "compress": metadata.version("compress-models"),
    }
    result = {"recipe": arguments.recipe, "windows": WINDOWS, "tokens": TOKENS, "machine": machine, "results": rows}
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    return int(any("failed" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
