"""The fold: each stage reads a checkpoint folder and writes one, in a place keyed by its fingerprint.

A fingerprint chains what decides the bytes: the input's digest or fingerprint, the stage's config and code, the
calibration windows, dtypes, device and library versions. A finished folder with the same fingerprint is reused; an
unfinished one goes on where its last whole block ended.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from compress.calibration import integer_rows
from compress.calibration.products import has_units_for_bfloat16
from compress.calibration.windows import Windows
from compress.checkpoints import attention
from compress.checkpoints.reader import Checkpoint
from compress.checkpoints.sources import cache_folder
from compress.checkpoints.working import WorkingCheckpoint
from compress.events import Event, Progress
from compress.files import A_CACHE, digest_of_json, disk_errors
from compress.memory.measure import PeakSampler
from compress.stages import Stage, StageContext
from compress.steps.environment import Machine, code_digest, versions
from compress.steps.following import together


@dataclass(frozen=True)
class Folded:
    """One applied stage: its output, its record for the report, its events."""

    checkpoint: Checkpoint
    fingerprint: str
    record: dict[str, Any]
    events: tuple[Event, ...]


def fold(
    stages: tuple[Stage, ...],
    source: Checkpoint,
    source_digest: str,
    windows: Windows | None,
    seed: int,
    machine: Machine,
    stored: torch.dtype,
    progress: Progress,
    sampler: PeakSampler,
    noun: str = "stage",
) -> list[Folded]:
    """Apply every stage in order. Finished ones are reused. `noun` is what peaks of memory are filed under."""
    done: list[Folded] = []
    checkpoint, key = source, source_digest
    chain: tuple[Checkpoint, ...] = ()
    for index, stage in enumerate(stages):
        key = fingerprint(key, stage, windows, seed, machine, stored)
        with sampler.phase(f"{noun} {index}: {getattr(stage, 'kind', '')}"):
            folded = _apply(stage, source, checkpoint, chain, key, windows, seed, machine, stored, progress, sampler)
        done.append(folded)
        chain = (*chain, checkpoint)
        checkpoint = folded.checkpoint
    return done


def stage_events(folded: list[Folded]) -> list[Event]:
    """Events of all stages. A module that one stage left alone and another quantised was not kept."""
    quantised = folded[-1].checkpoint.schemes if folded else {}
    found: list[Event] = []
    for event in (event for folding in folded for event in folding.events):
        kept = event.kind == "module_kept"
        if not (kept and (event.where in quantised or event in found)):
            found.append(event)
    return found


def fingerprint(
    before: str, stage: Stage, windows: Windows | None, seed: int, machine: Machine, stored: torch.dtype
) -> str:
    """sha256 of everything that decides a stage's output."""
    return digest_of_json(
        {
            "input": before,
            "stage": stage.model_dump(mode="json"),
            "stage_version": stage.version,
            "code": code_digest(),
            "calibration": windows.digest if windows is not None and stage.needs_calibration else None,
            "seed": seed if stage.draws else None,
            "machine": machine.to_json(),
            # What `products: auto`, and sums and attention that go with it, come to.
            "units": [has_units_for_bfloat16(), integer_rows.exact_here(), attention.faster_here()],
            "stored": str(stored),
            "versions": versions(),
        }
    )


def stage_folder(key: str) -> Path:
    return cache_folder() / "stages" / key[:32]


def _apply(
    stage: Stage,
    origin: Checkpoint,
    source: Checkpoint,
    chain: tuple[Checkpoint, ...],
    key: str,
    windows: Windows | None,
    seed: int,
    machine: Machine,
    stored: torch.dtype,
    progress: Progress,
    sampler: PeakSampler,
) -> Folded:
    folder = stage_folder(key)
    with disk_errors(cache_folder(), A_CACHE):
        folder.parent.mkdir(parents=True, exist_ok=True)
        # A second run of the same recipe waits here and then reuses what the first one made.
        with FileLock(str(folder) + ".lock"):
            output = WorkingCheckpoint(folder)
            reused = output.is_finished()
            events: list[Event] = []
            if reused:
                message = "a finished stage with the same fingerprint was reused"
                events.append(Event("stage_reused", key[:12], message))
            else:
                events += _resumed(output, key)
                output.finish(
                    _work(stage, origin, source, chain, output, key, windows, seed, machine, stored, progress)
                )
    record = output.record()
    checkpoint = Checkpoint(folder)
    sizes = {
        "weight_bytes_before": packed_bytes(source, stored),
        "weight_bytes_after": packed_bytes(checkpoint, stored),
    }
    report = {key: value for key, value in record.items() if key != "events"} | sizes
    report |= {"reused": reused, "peak_host_bytes": None if reused else sampler.current_peak}
    return Folded(checkpoint, key, report, tuple([*events, *(Event(**event) for event in record["events"])]))


def _work(
    stage: Stage,
    origin: Checkpoint,
    source: Checkpoint,
    chain: tuple[Checkpoint, ...],
    output: WorkingCheckpoint,
    key: str,
    windows: Windows | None,
    seed: int,
    machine: Machine,
    stored: torch.dtype,
    progress: Progress,
) -> dict[str, Any]:
    started = time.perf_counter()
    context = StageContext(
        origin=origin,
        source=source,
        chain=chain,
        output=output,
        windows=windows if stage.needs_calibration else None,
        device=machine.device,
        compute=machine.compute,
        stored=stored,
        tokens_at_once=machine.tokens_at_once,
        seed=seed,
        progress=progress,
    )
    with together(stage, context):
        outcome = stage.apply(context)
    config = stage.model_dump(mode="json")
    return {
        "kind": config["kind"],
        "config": config,
        "fingerprint": key,
        "seconds": time.perf_counter() - started + outcome.seconds_before,
        "seconds_by_part": outcome.seconds_by_part,
        "modules": outcome.modules,
        "facts": outcome.facts,
        "events": [event.to_json() for event in outcome.events],
    }


def _resumed(output: WorkingCheckpoint, key: str) -> list[Event]:
    blocks = len(list(output.folder.glob("block-*.json")))
    if not blocks:
        return []
    message = f"{blocks} finished blocks of an interrupted run were reused"
    return [Event("blocks_resumed", key[:12], message, {"blocks": blocks})]


def packed_bytes(checkpoint: Checkpoint, stored: torch.dtype) -> int:
    """Tensor bytes a working checkpoint will have once packed (codes are a byte each while stages run)."""
    total = 0
    for name in checkpoint.names:
        module = checkpoint.quantised_owner(name)
        if module:
            if name == f"{module}.codes":
                rows, columns = checkpoint.header(name)[1]
                total += checkpoint.schemes[module].stored_bytes(rows, columns, stored.itemsize)
        else:
            total += checkpoint.tensor_bytes(name)
    return total
