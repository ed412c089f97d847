"""What every worker shares: its command line, the windows, memory sampling and the dense checkpoint it hands back.

A worker runs inside one peer's own virtual environment, so this file needs only torch, safetensors and transformers.
It quantises one model with one setting, and writes into its --out folder

* a plain Hugging Face checkpoint in float32 holding W_hat, the weights a user of the peer would compute with, read
  back from the peer's own export (so the judge needs none of the peer's code), and
* result.json: what ran, for how long, and in how much memory.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

GROUP_SIZE = 64  # columns that share a scale; divides 576 and 1536, the widths of SmolLM2-135M
PACKAGES = ("torch", "transformers", "safetensors", "compressed-tensors", "numpy", "llmcompressor", "gptqmodel")


@dataclass(frozen=True)
class Job:
    """One worker's task: quantise `model` with `setting`, calibrated on `windows` (int64 `[windows, tokens]`)."""

    model: Path
    windows: torch.Tensor
    setting: str
    bits: int
    out: Path
    started: float = field(default_factory=time.perf_counter)


def parse_job(settings: Iterable[str]) -> Job:
    """Read the worker's command line; `settings` are the names it knows."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder")
    parser.add_argument(
        "--windows", type=Path, required=True, help="safetensors with input_ids, int64 [windows, tokens]"
    )
    parser.add_argument("--setting", choices=sorted(settings), required=True)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    windows = load_file(arguments.windows)["input_ids"]
    return Job(arguments.model, windows, arguments.setting, arguments.bits, arguments.out)


def memory_bytes(name: str) -> int:
    """Return a field of /proc/self/status in bytes: RssAnon (now, without mapped files) or VmHWM (peak, all)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


class Measured:
    """Context manager: wall and CPU seconds, and the peak of anonymous memory seen by a thread every 20 ms.

    CPU seconds and the load before tell a slow method from a busy machine.
    Anonymous memory is what the process itself allocated; pages of a mapped checkpoint are shared and can be dropped.
    """

    def __enter__(self) -> Measured:
        self.rss_before_bytes = self.peak_rss_bytes = memory_bytes("RssAnon")
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        self.load_before = os.getloadavg()[0]
        self._start, self._cpu = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.seconds, self.cpu_seconds = time.perf_counter() - self._start, time.process_time() - self._cpu
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            self.peak_rss_bytes = max(self.peak_rss_bytes, memory_bytes("RssAnon"))


def save_dense(model: Path, w_hat: Mapping[str, torch.Tensor], out: Path) -> float:
    """Write `model` with the weights of `w_hat` ("model.layers.0.mlp.up_proj" -> `[out, in]`) in float32.

    Returns the relative squared change of the replaced weights, as a guard against a checkpoint that was not quantised
    (0) or not unpacked rightly (near 1). Raises ValueError where a shape differs or a value is not finite.
    """
    dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    changed = total = 0.0
    with torch.no_grad():
        for name, replacement in w_hat.items():
            weight = dense.get_submodule(name).weight
            if weight.shape != replacement.shape or not torch.isfinite(replacement).all():
                raise ValueError(
                    f"{name}: {tuple(replacement.shape)} does not fit {tuple(weight.shape)} or is not finite"
                )
            changed += float((weight - replacement.float()).square().sum())
            total += float(weight.square().sum())
            weight.copy_(replacement)
    dense.save_pretrained(out)
    AutoTokenizer.from_pretrained(model).save_pretrained(out)
    return changed / total


def versions() -> dict[str, str]:
    """Return the installed version of every package that matters here."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def run_job(
    job: Job,
    package: str,
    options: Mapping[str, Any],
    load: Callable[[Job], Any],
    quantise: Callable[[Any, Job], Any],
    export: Callable[[Any, Path], None],
    read_back: Callable[[Path, Job], dict[str, torch.Tensor]],
) -> None:
    """Load, quantise, export, read back and write the dense checkpoint and result.json.

    Only `quantise` is timed as `seconds`; `export_seconds` is the peer's own save. `options` are for the record.
    """
    loaded = load(job)
    with Measured() as measured:
        quantised = quantise(loaded, job)
    job.out.mkdir(parents=True, exist_ok=True)
    exported = job.out / "exported"
    export_start = time.perf_counter()
    export(quantised, exported)
    export_seconds = time.perf_counter() - export_start
    hwm = memory_bytes("VmHWM")
    w_hat = read_back(exported, job)
    change = save_dense(job.model, w_hat, job.out)
    result = {
        "peer": package,
        "version": versions()[package],
        "setting": job.setting,
        "options": dict(options),
        "bits": job.bits,
        "group_size": GROUP_SIZE,
        "seconds": measured.seconds,
        "cpu_seconds": measured.cpu_seconds,
        "load_before": measured.load_before,
        "export_seconds": export_seconds,
        "wall_seconds": time.perf_counter() - job.started,
        "peak_rss_bytes": measured.peak_rss_bytes,
        "rss_before_bytes": measured.rss_before_bytes,
        "vm_hwm_bytes": hwm,
        "quantised_linears": len(w_hat),
        "relative_weight_change": change,
        "exported_bytes": sum(file.stat().st_size for file in exported.glob("*.safetensors")),
        "calibration_windows": list(job.windows.shape),
        "packages": versions(),
        "threads": torch.get_num_threads(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
    }
    (job.out / "result.json").write_text(json.dumps(result, indent=2) + "\n")
