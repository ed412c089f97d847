"""The noise floor: the source against itself, computed in batches of another size.

Batches of another shape make a machine add in another order. What that alone changes is no loss of the compressed
model; a difference below it means nothing. Kept beside the source's states, so that it is measured once.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from compress.calibration.windows import Windows
from compress.checkpoints.reader import Checkpoint
from compress.evaluation.measure import States, score, summarise, walk_states
from compress.evaluation.specs import Divergence, OnText, Perplexity
from compress.events import Progress, Quiet
from compress.files import write_text
from compress.steps.environment import Machine

WINDOWS = 4
"""Windows of each set that are computed again."""


@dataclass(frozen=True)
class Noise:
    """Of one set: what another batch size alone makes of the source."""

    name: str
    windows: int
    batch: int
    """Windows in a batch, as everywhere in this run."""
    other_batch: int
    """The same for the comparison."""
    mean_kl: float
    """Nats a token."""
    perplexity_ratio: float
    top1_agreement: float


def noise_floor(
    source: Checkpoint,
    states: States,
    sets: dict[str, Windows],
    kept: dict[str, Path],
    machine: Machine,
    progress: Progress,
) -> tuple[Noise, ...]:
    """Of every set. states: the source's on `sets`; kept: where each set's states are kept between runs."""
    found = {name: _load(path.with_suffix(".noise.json"), name) for name, path in kept.items()}
    missing = {name: sets[name].part(0, WINDOWS) for name, noise in found.items() if noise is None}
    if missing:
        width = max(windows.ids.shape[1] for windows in missing.values())
        usual = max(1, machine.tokens_at_once // width)
        other = 1 if usual > 1 else 2
        again = walk_states(
            source, missing, machine.device, machine.compute, other * width, progress, "the source's noise floor"
        )
        for name, windows in missing.items():
            noise = _compare(source, name, windows, states[name][:WINDOWS], again[name], machine, (usual, other))
            write_text(kept[name].with_suffix(".noise.json"), json.dumps(asdict(noise)))
            found[name] = noise
    return tuple(noise for noise in found.values() if noise is not None)


def _compare(
    source: Checkpoint,
    name: str,
    windows: Windows,
    first: Tensor,
    again: Tensor,
    machine: Machine,
    batches: tuple[int, int],
) -> Noise:
    sides = (source, {name: first}), (source, {name: again})
    scores = score(*sides, {name: windows}, machine.device, machine.compute, Quiet())
    asked: tuple[OnText, ...] = (Perplexity(data="-", set=name), Divergence(data="-", set=name))
    before, after = summarise(asked, scores)
    return Noise(
        name,
        len(windows.ids),
        *batches,
        mean_kl=after.values[f"divergence.{name}.mean_kl"],
        perplexity_ratio=after.values[f"perplexity.{name}"] / before.values[f"perplexity.{name}"],
        top1_agreement=after.values[f"divergence.{name}.top1_agreement"],
    )


def _load(path: Path, name: str) -> Noise | None:
    """A kept noise floor, or None if it is not there or not whole. One set may go by several names."""
    try:
        return Noise(**{**json.loads(path.read_text(encoding="utf-8")), "name": name})
    except (OSError, ValueError, TypeError):
        return None
