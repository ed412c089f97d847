"""The backward pass over the model's own loss: padding has no part in it."""

from __future__ import annotations

import torch

from compress.calibration.outputs import outputs_of
from compress.calibration.windows import Windows
from compress.checkpoints.reader import Checkpoint
from compress.checkpoints.skeleton import Skeleton
from compress.events import Quiet
from tests.tiny import CPU, random_model, random_windows


def test_a_padded_window_says_what_the_window_alone_says(tmp_path):
    """Labels are drawn token by token, so that the first ones are the same."""
    random_model("llama", tmp_path)
    skeleton, checkpoint = Skeleton(Checkpoint(tmp_path).config, CPU, torch.float32), Checkpoint(tmp_path)
    ids = random_windows(1, 20).ids
    padded = torch.cat([ids, torch.zeros(1, 12, dtype=torch.int64)], 1)
    mask = (torch.arange(32) < 20).to(torch.int64)[None]

    arguments = (100, 100, 1, Quiet())
    alone = outputs_of(skeleton, checkpoint, Windows(ids, None, {}), *arguments, tmp_path / "alone")
    beside = outputs_of(skeleton, checkpoint, Windows(padded, mask, {}), *arguments, tmp_path / "beside")

    for name in skeleton.linear_shapes():
        torch.testing.assert_close(beside.sensitivities(name), alone.sensitivities(name), rtol=1e-3, atol=1e-7)
        moments = alone.moments(name), beside.moments(name)
        if moments[0] is not None and moments[1] is not None:  # halves are cut where windows are
            first, second = (each.mean(0) for each in moments)
            torch.testing.assert_close(second, first, rtol=1e-3, atol=1e-7)
