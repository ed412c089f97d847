"""The windows training reads: most of them train, some are kept out to judge by, in an order that a seed decides.

Weights that were quantised before have been fitted to the calibration windows, those kept out of training among them:
there training that helps everywhere else begins at a disadvantage. Windows sampled for the training alone know neither.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.calibration.windows import Windows, kept_out
from compress.checkpoints.skeleton import Batch
from compress.errors import RecipeError


@dataclass(frozen=True)
class Material:
    """ids and mask (windows, tokens), mask None if nothing is padded; rows of both that train and that judge.
    `unseen`: those that judge were sampled for this training, and no stage before has read them."""

    ids: Tensor
    mask: Tensor | None
    training: Tensor
    held_out: Tensor
    windows_at_once: int
    unseen: bool = False

    def batch(self, rows: Tensor) -> Batch:
        return Batch(self.ids[rows], None if self.mask is None else self.mask[rows])

    def counts(self, rows: Tensor) -> Tensor:
        """(rows, tokens) bool: positions whose next token is real, the ones that the evaluations count too."""
        counts = torch.ones(len(rows), self.ids.shape[1], dtype=torch.bool)
        if self.mask is not None:
            counts[:, :-1] = self.mask[rows, 1:] != 0
        counts[:, -1] = False
        return counts

    def real(self, rows: Tensor) -> Tensor:
        """(rows, tokens) bool: positions that are not padding."""
        if self.mask is None:
            return torch.ones(len(rows), self.ids.shape[1], dtype=torch.bool)
        return self.mask[rows] != 0

    def tokens(self, rows: Tensor) -> int:
        return int(self.real(rows).sum())

    def every_batch(self) -> list[Tensor]:
        """All rows in order, a batch at a time."""
        return list(torch.split(torch.arange(len(self.ids)), self.windows_at_once))

    def held_out_batches(self) -> list[Tensor]:
        return list(torch.split(self.held_out, self.windows_at_once))

    def epoch(self, number: int, seed: int) -> list[Tensor]:
        """The training rows of one epoch, shuffled, a batch at a time."""
        order = torch.randperm(len(self.training), generator=_generator(seed, 1 + number))
        return list(torch.split(self.training[order], self.windows_at_once))


def material(
    windows: Windows, more: Windows | None, holdout: float, batch_tokens: int, seed: int, fitted: bool = False
) -> Material:
    """Keep windows out, a fraction `holdout` of the number of `windows`: of `windows` themselves, or, where stages
    before have `fitted` weights to those, as many of `more` if that leaves half of it. All others (of one width) train.

    Raises RecipeError for a single window, which cannot be split.
    """
    count = len(windows.ids)
    if count < 2:
        raise RecipeError(
            "calibration.windows: training keeps some windows out to judge by, and the calibration text gave only "
            f"{count}; use a longer text or a smaller window_tokens"
        )
    training, held_out = kept_out(count, holdout, seed)
    ids, mask, unseen = windows.ids, windows.mask, False
    if more is not None:
        further = torch.arange(len(more.ids))
        unseen = fitted and 2 * len(held_out) <= len(further)
        if unseen:
            further, judging = kept_out(len(further), len(held_out) / len(further), seed)
            training, held_out = torch.arange(count), count + judging
        training = torch.cat([training, count + further])
        ids = torch.cat([ids, more.ids])
        mask = None if mask is None else torch.cat([mask, torch.ones_like(more.ids)])
    # No step is larger than all of the text, whatever was asked for.
    at_once = min(len(training), max(1, batch_tokens // ids.shape[1]))
    return Material(ids, mask, training, held_out, at_once, unseen)


def _generator(seed: int, draw: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + draw)
