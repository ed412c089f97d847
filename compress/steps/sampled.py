"""Calibration windows sampled from the source, kept in the cache: minutes of work, and a run that goes on after a kill
must find the text that its stages were solved with, whatever the number of threads then.

    <cache>/texts/<key>.safetensors     ids (windows, tokens), the ledger as metadata
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from filelock import FileLock
from safetensors import SafetensorError

from compress.calibration.products import has_units_for_bfloat16
from compress.calibration.self_generated import sample_windows
from compress.calibration.window_specs import WindowSpec
from compress.calibration.windows import Windows
from compress.checkpoints.sources import cache_folder
from compress.events import Event, Progress
from compress.files import A_CACHE, digest_of_json, disk_errors
from compress.steps.environment import Machine, code_digest
from compress.steps.source import OpenedSource
from compress.training import saved


def sampled_windows(spec: WindowSpec, source: OpenedSource, seed: int, machine: Machine, progress: Progress) -> Windows:
    """Windows of a self-generated text, sampled now or found as they were."""
    path = _path(spec, source, seed, machine)
    with disk_errors(cache_folder(), A_CACHE):
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            found, events = _found(path)
            if found is not None:
                return found
            windows = sample_windows(spec, source.checkpoint, source.tokenizer, seed, machine.device, progress)
            saved.save(path, {"ids": windows.ids}, windows.ledger)
    return replace(windows, events=(*windows.events, *events))


def _found(path: Path) -> tuple[Windows | None, list[Event]]:
    """What was kept, or the event that it cannot be read."""
    try:
        kept = saved.load(path)
        return (Windows(kept[0]["ids"], None, kept[1]) if kept else None), []
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        message = f"text kept from an earlier run cannot be read ({error}) and was sampled again: {path}"
        return None, [Event("sampled_again", "calibration", message)]


def _path(spec: WindowSpec, source: OpenedSource, seed: int, machine: Machine) -> Path:
    asked = {
        "source": source.digest,
        "spec": spec.model_dump(mode="json"),
        "seed": seed,
        "device": machine.device.type,
        "bfloat16": has_units_for_bfloat16(),
        "code": code_digest(),
        "torch": torch.__version__,
    }
    return cache_folder() / "texts" / f"{digest_of_json(asked)[:32]}.safetensors"
