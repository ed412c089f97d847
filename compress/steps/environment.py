"""Where a run happens: device, threads, versions, git state. All of it goes into fingerprints or provenance."""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from compress import __version__, parallel
from compress.errors import EnvironmentLacksError
from compress.memory.measure import free_bytes

PACKAGES = (
    "torch",
    "transformers",
    "compressed-tensors",
    "safetensors",
    "tokenizers",
    "datasets",
    "gguf",
    "numpy",
    "numba",
    "triton",
)
_CODE = (
    "allocation",
    "architecture.py",
    "parallel.py",
    "pruning",
    "quantization",
    "calibration",
    "checkpoints",
    "training",
    "stages",
    "evaluation",
)


CPU_TOKENS = 1024
"""Tokens of a batch on a CPU: intermediate results stay small enough for the heap, products large enough to be fast."""


@dataclass(frozen=True)
class Machine:
    """Where tensors live and in what dtype they compute. `tokens_at_once`: tokens in one batch of the walk."""

    device: torch.device
    compute: torch.dtype
    tokens_at_once: int

    def to_json(self) -> dict[str, Any]:
        """What decides the bytes of a result, beside code and data."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else platform.machine()
        return {
            "device": f"{self.device.type} ({name})",
            "compute_dtype": str(self.compute).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "tokens_at_once": self.tokens_at_once,
        }


def choose_machine(asked: str, config: dict[str, Any]) -> Machine:
    """The machine for a recipe's `model.device`. Raises EnvironmentLacksError for CUDA where there is none."""
    here = torch.cuda.is_available()
    if asked == "cuda" and not here:
        raise EnvironmentLacksError(
            "model.device: cuda is asked for, but torch sees no CUDA device here. Use device: auto or cpu, or run "
            "where `python -c 'import torch; print(torch.cuda.is_available())'` prints True."
        )
    if asked == "cpu" or not here:
        return Machine(torch.device("cpu"), torch.float32, CPU_TOKENS)
    declared = str(config.get("dtype") or config.get("torch_dtype") or "")
    compute = torch.bfloat16 if declared == "bfloat16" else torch.float32
    return Machine(torch.device("cuda", torch.cuda.current_device()), compute, 16384)


def fits(parameters: int, reload_bytes: int, machine: Machine) -> bool:
    """Whether loading the whole export, dequantised, fits in four fifths of the free memory. `reload_bytes`: what
    `memory.predict.reload_peak_bytes` says of the host; a GPU holds the parameters in float32."""
    needed = parameters * 4 if machine.device.type == "cuda" else reload_bytes
    return needed < 0.8 * free_bytes(machine.device)


@cache
def code_digest() -> str:
    """sha256 over the code that decides results, so that finished stages of other code are not reused."""
    root = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for part in _CODE:
        paths = [root / part] if part.endswith(".py") else sorted((root / part).rglob("*.py"))
        for path in paths:
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Version of this package, of Python, and of every library that touches tensors or text."""
    found = {"compress": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_state() -> str | None:
    """Commit of the folder the command runs in, '+changes' if its tree is not clean; None outside a repository."""
    try:
        commit = _git("rev-parse", "HEAD")
        return commit + ("+changes" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], capture_output=True, text=True, timeout=10, check=True, env={**os.environ, "LC_ALL": "C"}
    ).stdout.strip()


def provenance() -> dict[str, Any]:
    """What the report says about where it was made."""
    return {
        "versions": versions(),
        "platform": platform.platform(),
        "processor": _processor(),
        "command": _readable(shlex.join(sys.argv)),
        "working_directory": _readable(str(Path.cwd())),
        "user": _readable(os.environ.get("USER") or os.environ.get("LOGNAME") or str(os.getuid())),
        "host": platform.node(),
        "processes": parallel.met(),
        "git_of_working_directory": git_state(),
        "code": code_digest(),
    }


def _readable(text: str) -> str:
    """Bytes that are no UTF-8, as escapes: a report that holds them could not be written."""
    return text.encode("utf-8", "backslashreplace").decode()


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return f"{line.split(':', 1)[1].strip()} x{os.cpu_count()}"
    except OSError:
        pass
    return platform.processor() or platform.machine()
