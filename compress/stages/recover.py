"""Recover: train a pruned or quantised model to bring it back towards its source.

Pruning and rounding decide each linear by itself, or against the errors before it. Training sees the end: the KL
divergence of the next-token probabilities from the source's, lowered by gradient descent over a few epochs of
calibration text. For a quantised model that is the end-to-end phase of EfficientQAT (arXiv 2407.11062) with the source
as teacher instead of the text: scales and norms are trained and, if asked for, the codes (quantisation-aware training).
For a pruned one it is knowledge distillation: all weights of the blocks are trained, or low-rank changes to them. Zero
points, embeddings and head stay. Windows kept out of training choose the state that ships; if none is better than the
input, the input ships.

Where the whole model does not fit, blocks are trained one by one against the source's (`training.block_wise`).
`recovering` does it; here are the fields, and what `plan` can say before anything is read.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from compress.architecture import Architecture
from compress.calibration.products import Products
from compress.calibration.windows import HELD_OUT
from compress.quantization.scheme import Scheme
from compress.stages.base import Shapes, Stage, StageContext, StageOutcome, Training
from compress.stages.recovering import Run
from compress.training.descent import share_of_rate
from compress.training.footprint import Mode
from compress.training.trained import Trainable, What, rate_of_codes, require_peft

ENOUGH_HELD_OUT = 8192
"""Tokens that tell states of training apart, which are all judged on the same ones. Judging 16,000 of 131,000 nine
times took a quarter of the time of a run."""


class Recover(Stage):
    """Train a pruned or quantised model by its KL divergence from the source."""

    kind: Literal["recover"] = "recover"
    train: What = Field(
        default="scales+norms",
        description="of a quantised model scales, scales+norms, or codes (with both); of any norms; of a pruned one "
        "weights (of all blocks, with norms) or lora (low-rank changes to them, merged)",
    )
    rank: int = Field(default=16, ge=1, description="of LoRA's matrices")
    hidden_share: float = Field(
        default=0.0,
        ge=0,
        description="weight in the loss, beside the KL, of the relative squared difference of final hidden states",
    )
    epochs: int = Field(default=3, ge=1, description="passes over the training windows")
    learning_rate: float = Field(
        default=1e-3,
        gt=0,
        allow_inf_nan=False,
        description="Adam's largest, of a relative change; rises over a fifth of the steps and falls linearly to zero",
    )
    batch_tokens: int = Field(default=2048, ge=1, description="tokens of one step, in whole windows")
    holdout: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description=f"windows kept out, as a share of the calibration windows, to choose what ships; left out: an "
        f"eighth, but of a long text about {ENOUGH_HELD_OUT:,} tokens. After quantising they are of the "
        "self_generated_windows where these are at least twice as many: the calibration windows have been fitted",
    )
    patience: int = Field(default=6, ge=1, description="evaluations without a better one before training stops")
    self_generated_windows: int = Field(
        default=0, ge=0, description="windows sampled from the source model, beside the calibration text"
    )
    products: Products = Field(
        default="auto",
        description="what linears multiply in while they train; auto: bfloat16 on a CPU with units for it, else the "
        "walk's; what ships is judged in the walk's",
    )
    mode: Mode = Field(
        default="auto",
        description="model: end to end; block: one decoder block after another; auto: model if that fits in memory",
    )
    needs_calibration: ClassVar[bool] = True
    draws: ClassVar[bool] = True

    @property
    def activation_streams(self) -> int:
        return 0  # nothing is held inside a block; `training` says what is kept

    @property
    def training(self) -> Training:
        # Forward, again where memory is short, and a backward pass that counts twice; the teacher's and evaluations.
        judged = self.holdout or HELD_OUT
        forwards = 1 + self.epochs * (4 * (1 - judged) + 3 * judged)
        return Training(forwards, self.batch_tokens, self.self_generated_windows, self.mode, self._trained)

    def share_held_out(self, tokens: int) -> float:
        """Of so many calibration tokens, the share that never trains."""
        return self.holdout or min(HELD_OUT, ENOUGH_HELD_OUT / tokens)

    def steps(self, windows: int, window_tokens: int) -> int:
        """Of training, for so many calibration windows."""
        held_out = min(windows - 1, max(1, round(self.share_held_out(windows * window_tokens) * windows)))
        at_once = max(1, self.batch_tokens // window_tokens)
        return self.epochs * math.ceil((windows - held_out + self.self_generated_windows) / at_once)

    def way_of_codes(self, windows: int, window_tokens: int) -> float:
        """How far trained codes can come in all steps, in codes."""
        steps = self.steps(windows, window_tokens)
        way = sum(share_of_rate(step, steps) for step in range(steps))
        return way * self.learning_rate * rate_of_codes(way)

    @property
    def needs_codes(self) -> bool:
        return self._trained.scales

    @property
    def needs_weights(self) -> bool:
        return self.train in ("weights", "lora")

    @property
    def _trained(self) -> Trainable:
        return Trainable(self.train, self.rank)

    @model_validator(mode="after")
    def _hidden_states_of_the_whole(self) -> Recover:
        if self.hidden_share and self.mode == "block":
            raise ValueError(
                "hidden_share is part of the loss of mode: model; block by block, states are the whole loss"
            )
        if (
            "rank" in self.model_fields_set
            and self.train != "lora"
            and self.rank != Recover.model_fields["rank"].default
        ):
            raise ValueError(f"rank is LoRA's; train is {self.train}")
        return self

    def check(self, shapes: Shapes, architecture: Architecture) -> list[str]:
        del shapes, architecture
        if self.train == "lora":
            require_peft()
        return []

    def schemes(self, shapes: Shapes) -> dict[str, Scheme]:
        del shapes
        return {}

    def apply(self, context: StageContext) -> StageOutcome:
        return Run(self, context).outcome()
