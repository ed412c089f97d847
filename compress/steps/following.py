"""How processes started by torchrun share a stage: the leader announces it, the followers apply it beside the leader.

Followers know nothing of recipes, fingerprints and locks. They get the stage, the folders, the windows and the machine
from the leader, walk their share of the windows, and write nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from compress import parallel
from compress.calibration.windows import Windows
from compress.checkpoints.reader import Checkpoint
from compress.checkpoints.working import WorkingCheckpoint
from compress.errors import RecipeError
from compress.events import Quiet
from compress.stages import Stage, StageContext


@dataclass(frozen=True)
class _Task:
    """A stage to apply, as it travels: folders instead of what is opened from them."""

    stage: Stage
    origin: Path
    source: Path
    output: Path
    windows: Windows
    seed: int
    device: str
    compute: torch.dtype
    stored: torch.dtype
    tokens_at_once: int

    def context(self) -> StageContext:
        """A follower's context: its own device, no progress."""
        device = torch.device(self.device)
        return StageContext(
            origin=Checkpoint(self.origin),
            source=Checkpoint(self.source),
            output=WorkingCheckpoint(self.output),
            windows=self.windows,
            seed=self.seed,
            device=torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" else device,
            compute=self.compute,
            stored=self.stored,
            tokens_at_once=self.tokens_at_once,
            progress=Quiet(),
        )


@contextmanager
def leading() -> Iterator[None]:
    """What the leader does happens inside. At the end, also after an error, followers are sent home."""
    try:
        yield
    finally:
        if parallel.met() > 1:
            parallel.announce(None)


@contextmanager
def together(stage: Stage, context: StageContext) -> Iterator[None]:
    """Have the followers apply `stage` while the leader applies it inside. Does nothing in a single process, or for a
    stage that does not share its windows. An error inside closes the connections, so that no follower waits for ever.

    Raises RecipeError where there are more processes than batches of calibration text.
    """
    if parallel.met() == 1 or not stage.shares_windows or context.windows is None:
        yield
        return
    batches = len(context.windows.batches(context.tokens_at_once, stage.batches_at_least))
    if batches < parallel.met():
        raise RecipeError(
            f"calibration: {batches} batches of {context.tokens_at_once} tokens for {parallel.met()} processes. Start "
            f"at most {batches} with torchrun --nproc-per-node, or use more calibration windows."
        )
    parallel.announce(
        _Task(
            stage,
            context.origin.folder.resolve(),
            context.source.folder.resolve(),
            context.output.folder.resolve(),
            replace(context.windows, events=()),
            context.seed,
            context.device.type,
            context.compute,
            context.stored,
            context.tokens_at_once,
        )
    )
    with parallel.group():
        yield


def follow() -> None:
    """Apply what the leader announces until it sends this process home.

    Raises PeerEndedError if the leader ends in the middle of a stage.
    """
    while (task := parallel.announced()) is not None:
        assert isinstance(task, _Task)
        with parallel.group():
            task.stage.apply(task.context())
