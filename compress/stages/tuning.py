"""Divergence from a stage's input, measured on calibration windows that nothing was computed from."""

from __future__ import annotations

import math
from dataclasses import dataclass

from compress.calibration.windows import Windows
from compress.checkpoints.reader import Checkpoint
from compress.errors import UnhealthySourceError
from compress.evaluation.measure import States, score, walk_states
from compress.events import Quiet
from compress.stages.base import StageContext


@dataclass(frozen=True)
class Judged:
    """Of a model on the tuning windows, a token: mean KL to the stage's input, and by how much the loss rose (nats)."""

    kl: float
    lost: float

    @property
    def perplexity_ratio(self) -> float:
        """Over the input's."""
        return math.exp(min(self.lost, 700.0))


class TuningText:
    """The tuning windows, and what the stage's input says of them; that is computed once, when it is first needed."""

    def __init__(self, context: StageContext, windows: Windows) -> None:
        self._context, self.windows = context, windows
        self._states: States | None = None

    @property
    def tokens(self) -> int:
        return self.windows.tokens

    def judge(self, checkpoint: Checkpoint) -> Judged:
        """Walk a model over the windows. Raises UnhealthySourceError where the result is no finite number."""
        context = self._context
        if self._states is None:
            self._states = self._walk(context.source)
        pairs = (context.source, self._states), (checkpoint, self._walk(checkpoint))
        scores = score(*pairs, {"tuning": self.windows}, context.device, context.compute, Quiet())["tuning"]
        kl, lost = (
            float(value[scores.counts].double().mean())
            for value in (scores.divergence, scores.loss - scores.source_loss)
        )
        if not (math.isfinite(kl) and math.isfinite(lost)):
            raise UnhealthySourceError(
                "some candidates of mixed_precision gave a divergence that is no finite number; leave out those with "
                "the fewest bits"
            )
        return Judged(kl, lost)

    def _walk(self, checkpoint: Checkpoint) -> States:
        context, sets = self._context, {"tuning": self.windows}
        return walk_states(checkpoint, sets, context.device, context.compute, context.tokens_at_once, Quiet(), "")
