"""The small model `glass`, text that it knows, and the command line, for every test.

Workers of pytest-xdist share one folder: whoever comes first builds under a lock, the others find it done.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Before torch is imported: one thread a worker, so that the bytes of results do not depend on the machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from filelock import FileLock

# Before triton is imported: where nothing could run its compiled kernels, its interpreter does.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from tests.helpers import PROJECT, Ended, changed, environment, run_cli, write_recipe

_USERS_CACHE = os.environ.get("COMPRESS_CACHE")


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all workers of this session see."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session", autouse=True)
def _own_cache(shared: Path) -> Iterator[None]:
    """Nothing is read from, or left in, the user's cache of stages and baselines."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COMPRESS_CACHE", str(shared / "compress-cache"))
        patch.delenv("COMPRESS_STORE", raising=False)
        yield


def once(folder: Path, build: Callable[[Path], None]) -> Path:
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            half = folder.with_name(folder.name + ".half")
            shutil.rmtree(half, ignore_errors=True)
            half.mkdir(parents=True)
            build(half)
            half.rename(folder)
    return folder


@pytest.fixture(scope="session")
def glass(shared: Path) -> Path:
    """A trained 850-thousand-parameter Llama, fp16: context 128, d_ff 341. $COMPRESS_GLASS names one made before."""
    made = os.environ.get("COMPRESS_GLASS")
    if made and (Path(made) / "config.json").is_file():
        return Path(made)

    def fetch(folder: Path) -> None:
        env = environment({"COMPRESS_CACHE": _USERS_CACHE} if _USERS_CACHE else {})
        if not _USERS_CACHE:
            env.pop("COMPRESS_CACHE")
        subprocess.run([sys.executable, PROJECT / "scripts" / "get_glass.py", folder], env=env, check=True)

    return once(shared / "glass", fetch)


@pytest.fixture(scope="session")
def texts(glass: Path, shared: Path) -> Path:
    """calibration.jsonl and evaluation.jsonl: what glass itself writes, from different seeds."""

    def build(folder: Path) -> None:
        for name, seed, count in (("calibration", 1, 96), ("evaluation", 2, 48)):
            lines = [json.dumps({"text": text}) for text in _sampled(glass, seed, count)]
            (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")

    return once(shared / "texts", build)


def _sampled(glass: Path, seed: int, count: int) -> list[str]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(glass)
    model = AutoModelForCausalLM.from_pretrained(glass, dtype=torch.float32).eval()
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        start = torch.full((count, 1), tokenizer.bos_token_id)
        ids = model.generate(start, do_sample=True, top_k=0, max_length=128, pad_token_id=tokenizer.pad_token_id)
    return tokenizer.batch_decode(ids, skip_special_tokens=True)


@pytest.fixture(scope="session")
def glass_recipe(glass: Path, texts: Path) -> dict[str, Any]:
    """A recipe that passes in seconds. The 341 columns of down_proj divide by nothing, so it gets one scale a row."""
    held_out = {"data": {"kind": "files", "paths": [str(texts / "evaluation.jsonl")]}, "set": "held-out"}
    calibration = {"kind": "files", "paths": [str(texts / "calibration.jsonl")]}
    return {
        "schema": 1,
        "name": "glass-int4",
        "seed": 0,
        "model": {"path": str(glass)},
        "calibration": {"data": calibration, "windows": 24, "window_tokens": 128},
        "stages": [
            {
                "kind": "gptq",
                "bits": 4,
                "group_size": 32,
                "overrides": [{"match": "*.down_proj", "group_size": "channel"}],
            }
        ],
        "export": {"format": "compressed-tensors", "context": 128},
        "evaluation": [
            {"kind": "perplexity", **held_out, "windows": 8, "window_tokens": 128},
            {"kind": "divergence", **held_out, "windows": 8, "window_tokens": 128},
        ],
        "gates": [
            {"kind": "relative", "measure": "perplexity.held-out", "max_ratio": 1.5},
            {"kind": "threshold", "measure": "divergence.held-out.mean_kl", "max": 0.5},
        ],
    }


@pytest.fixture
def recipe(glass_recipe: dict[str, Any], tmp_path: Path) -> Callable[..., Path]:
    """recipe(gates=[...]) writes the glass recipe with top-level keys replaced, and gives its path."""

    def write(**changes: Any) -> Path:
        return write_recipe(tmp_path / "recipe.yaml", changed(glass_recipe, **changes))

    return write


@pytest.fixture
def cli() -> Callable[..., Ended]:
    """The command in a process of its own."""
    return run_cli


@pytest.fixture
def here() -> Callable[..., Ended]:
    """The command in this process: the same code without the seconds of starting Python and torch."""
    from compress.cli.app import guarded

    def run(*arguments: object) -> Ended:
        out, err = io.StringIO(), io.StringIO()
        handler = signal.getsignal(signal.SIGTERM)
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = guarded([str(argument) for argument in arguments])
        finally:
            signal.signal(signal.SIGTERM, handler)
        return Ended(code, out.getvalue(), err.getvalue())

    return run
