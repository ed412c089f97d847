"""What removing a piece costs the loss, to first order, against autograd through a mask on the pieces."""

from __future__ import annotations

import pytest
import torch

from compress.calibration.effects import removal_effects
from compress.checkpoints.reader import Checkpoint
from compress.checkpoints.skeleton import Skeleton
from compress.events import Quiet
from tests.tiny import CPU, random_model, random_windows


@pytest.mark.parametrize("padded", [False, True])
def test_against_a_gradient_of_each_piece_at_each_token(tmp_path, padded):
    """With a factor on every piece at every token, the loss's derivative by it is sum x g; labels are drawn alike."""
    model = random_model("llama", tmp_path)
    windows = random_windows(2, 10, padded=padded)
    (batch,) = windows.batches(48)
    skeleton = Skeleton(Checkpoint(tmp_path).config, CPU, torch.float32)
    widths = {"mlp.down_proj": 1, "self_attn.o_proj": 32}

    found = removal_effects(skeleton, Checkpoint(tmp_path), [batch], widths, 3, Quiet())

    factors = {}

    def scaled(name, width):
        def hook(linear, args):
            inputs = args[0]
            factor = torch.ones(*inputs.shape[:-1], inputs.shape[-1] // width, requires_grad=True)
            factors[name] = factor
            return (inputs * factor.repeat_interleave(width, -1),)

        return hook

    for index in range(2):
        for name, width in widths.items():
            full = f"model.layers.{index}.{name}"
            model.get_submodule(full).register_forward_pre_hook(scaled(full, width))
    logits = model(batch.ids, attention_mask=batch.mask, use_cache=False).logits.flatten(0, 1)
    generator = torch.Generator().manual_seed(3 * 1_000_003)
    labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator).squeeze(1)
    torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
    for name, factor in factors.items():
        squares = factor.grad.square()
        if batch.mask is not None:
            squares = squares * batch.mask.unsqueeze(-1)
        torch.testing.assert_close(found[name], squares.sum((0, 1)) / batch.tokens, rtol=1e-3, atol=1e-6)
