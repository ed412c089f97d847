"""The backward pass over the model's own loss: padding has no part in it."""

from __future__ import annotations

import torch

from compress.calibration.fisher import output_sensitivities
from compress.checkpoints.reader import Checkpoint
from compress.checkpoints.skeleton import Batch, Skeleton
from compress.events import Quiet
from tests.tiny import CPU, random_model, random_windows


def test_a_padded_window_says_what_the_window_alone_says(tmp_path):
    """Labels are drawn token by token, so that the first ones are the same."""
    random_model("llama", tmp_path)
    skeleton, checkpoint = Skeleton(Checkpoint(tmp_path).config, CPU, torch.float32), Checkpoint(tmp_path)
    ids = random_windows(1, 20).ids
    padded = torch.cat([ids, torch.zeros(1, 12, dtype=torch.int64)], 1)
    mask = (torch.arange(32) < 20).to(torch.int64)[None]

    alone = output_sensitivities(skeleton, checkpoint, [Batch(ids)], 1, Quiet())
    beside = output_sensitivities(skeleton, checkpoint, [Batch(padded, mask)], 1, Quiet())

    for name, values in alone.items():
        torch.testing.assert_close(beside[name], values, rtol=1e-3, atol=1e-7)
