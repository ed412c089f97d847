"""The source model: on disk, opened, and healthy enough to be a baseline."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compress.checkpoints.reader import Checkpoint, all_finite
from compress.checkpoints.skeleton import Skeleton
from compress.checkpoints.sources import ModelSpec, Source, resolve
from compress.errors import EnvironmentLacksError, UnhealthySourceError
from compress.events import Event, Progress

READ_AT_ONCE = 4
"""Tensors that are looked at together."""


@dataclass(frozen=True)
class OpenedSource:
    """A source ready to work with. `digest` covers config, weights and tokenizer."""

    source: Source
    checkpoint: Checkpoint
    digest: str
    tokenizer: Any
    events: tuple[Event, ...]


def open_source(spec: ModelSpec, progress: Progress, *, as_it_is: bool = False) -> OpenedSource:
    """Fetch or convert, open, check that all weights are there and finite. Raises UnhealthySourceError naming them.

    as_it_is: leave quantised linears quantised, of a release that others are compared with.
    """
    source = resolve(spec, Path.cwd(), progress, values=not as_it_is)
    checkpoint = Checkpoint(source.folder)
    check_complete(checkpoint)
    stop = threading.Event()
    with ThreadPoolExecutor(1) as beside:
        # Hashing reads the same files, and keeps other cores busy. Nobody waits for it once something is wrong.
        digest = beside.submit(checkpoint.digest, stop)
        try:
            _check_finite(checkpoint, spec.label, progress)
        except BaseException:
            stop.set()
            raise
    events = []
    if source.was_quantized:
        events.append(
            Event(
                "source_was_quantized",
                "model",
                f"the source weights came from a quantised file ({source.facts['previous_quantization']})"
                + (", moved off its grid by rescaling" if spec.rescale else "; quality on its old grid is flattered"),
            )
        )
    return OpenedSource(source, checkpoint, digest.result(), load_tokenizer(source.folder), tuple(events))


def check_complete(checkpoint: Checkpoint) -> None:
    """Every parameter of the model is stored, in the shape its config says. Raises UnhealthySourceError if not."""
    shapes = Skeleton(checkpoint.config, torch.device("cpu"), torch.float32).parameter_shapes()
    head = f"{checkpoint.architecture.head}.weight"
    if checkpoint.head_stored_twice == "differs":
        raise UnhealthySourceError(
            f"{checkpoint.folder}: config.json ties the head to the embedding, and {head} is stored with other values; "
            "some runtimes take one, some the other. Set tie_word_embeddings: false, or take that tensor out."
        )
    bad = []
    for name, shape in shapes.items():
        module, _, leaf = name.rpartition(".")
        if leaf == "weight" and module in checkpoint.schemes:
            continue
        if not checkpoint.has(name):
            bad.append(f"{name} is missing")
        elif checkpoint.header(name)[1] != shape:
            bad.append(f"{name} has shape {checkpoint.header(name)[1]}, the config says {shape}")
    if bad:
        more = f"; and {len(bad) - 5} more" if len(bad) > 5 else ""
        if any(each.startswith(head) for each in bad):
            more += " (config.json does not tie the head to the embedding)"
        raise UnhealthySourceError(
            f"{checkpoint.folder}: {'; '.join(bad[:5])}{more}. The weight files do not belong to this config or are "
            "not whole; fetch them again."
        )


def _check_finite(checkpoint: Checkpoint, place: str, progress: Progress) -> None:
    """`place`: the model as the recipe names it; what is read may be a copy of its values in the cache."""

    def looked_at(name: str) -> str | None:
        tensor = checkpoint.read(name)
        if not tensor.is_floating_point() or all_finite(tensor):
            return None
        return f"{name} ({int((~torch.isfinite(tensor)).sum())} values)"

    bad = []
    with (
        progress.task("source health", len(checkpoint.names)) as advance,
        ThreadPoolExecutor(min(READ_AT_ONCE, os.cpu_count() or 1)) as threads,
    ):
        try:
            for found in threads.map(looked_at, checkpoint.names):
                bad += [found] if found else []
                advance("")
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            raise
    if bad:
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise UnhealthySourceError(
            f"{place}: NaN or infinite weights in {', '.join(bad[:5])}{more}. The source is damaged; fetch "
            "it again, or repair it before compressing."
        )


def check_perplexity(perplexities: dict[str, float], limit: float) -> None:
    """The floor of health: a source that cannot predict the evaluation text is no baseline."""
    bad = {name: value for name, value in perplexities.items() if not value <= limit}
    if bad:
        found = ", ".join(f"{value:.4g} on {name}" for name, value in bad.items())
        raise UnhealthySourceError(
            f"the source model's perplexity is {found}, above model.max_perplexity ({limit:g}). It is broken, or the "
            "text is not what it was trained for; nothing was compressed."
        )


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder. Raises EnvironmentLacksError if it cannot be loaded."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise EnvironmentLacksError(f"{folder}: the tokenizer cannot be loaded ({first}).") from error
