"""Calibration windows sampled from the source, kept in the cache: minutes of work, and a run that goes on after a kill
must find the text that its stages were solved with, whatever the number of threads then.

    <cache>/texts/<key>.safetensors     ids (windows, tokens), the ledger as metadata
"""

from __future__ import annotations

from pathlib import Path

import torch
from filelock import FileLock

from compress.calibration.self_generated import sample_windows
from compress.calibration.windows import Windows, WindowSpec
from compress.checkpoints.sources import cache_folder
from compress.events import Progress
from compress.files import digest_of_json, disk_errors
from compress.steps.environment import Machine
from compress.steps.source import OpenedSource
from compress.training import saved


def sampled_windows(spec: WindowSpec, source: OpenedSource, seed: int, machine: Machine, progress: Progress) -> Windows:
    """Windows of a self-generated text, sampled now or found as they were."""
    path = _path(spec, source, seed, machine)
    with disk_errors(cache_folder()):
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            found = saved.load(path)
            if found is not None:
                return Windows(found[0]["ids"], None, found[1])
            windows = sample_windows(spec, source.checkpoint, source.tokenizer, seed, machine.device, progress)
            saved.save(path, {"ids": windows.ids}, windows.ledger)
    return windows


def _path(spec: WindowSpec, source: OpenedSource, seed: int, machine: Machine) -> Path:
    asked = {
        "source": source.digest,
        "spec": spec.model_dump(mode="json"),
        "seed": seed,
        "device": machine.device.type,
        "torch": torch.__version__,
    }
    return cache_folder() / "texts" / f"{digest_of_json(asked)[:32]}.safetensors"
