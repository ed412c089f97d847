"""Token weights: squared gradients by autograd through the whole model, clipped, blended, and of mean 1."""

from __future__ import annotations

import pytest
import torch

from compress.calibration import backward
from compress.calibration.token_weights import _Sums, normalised, token_weights
from compress.checkpoints.reader import Checkpoint
from compress.checkpoints.skeleton import Skeleton
from compress.events import Quiet
from tests.tiny import CPU, random_model, random_windows


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_gradients_are_those_of_the_whole_model(name, tmp_path, monkeypatch):
    """transformers' own model, its loss on the same sampled labels, and autograd: one linear of the first block."""
    model = random_model(name, tmp_path)
    checkpoint = Checkpoint(tmp_path)
    skeleton = Skeleton(checkpoint.config, CPU, torch.float32)
    batches = random_windows(count=2).batches(1000)
    labels = []
    original = backward.tokens_drawn

    def remembering(*arguments, **options):
        labels.append(original(*arguments, **options))
        return labels[-1]

    monkeypatch.setattr(backward, "tokens_drawn", remembering)
    sums = _Sums(skeleton)
    backward.walk_backward(skeleton, checkpoint, batches, [3], sums.watch)
    found = sums.means()

    group = skeleton.architecture.groups[-1]
    outputs = []

    def keep(linear, arguments, output):
        output.retain_grad()
        outputs.append(output)

    model.get_submodule(f"{skeleton.architecture.block_name(0)}.{group.linears[0]}").register_forward_hook(keep)
    logits = model(batches[0].ids, use_cache=False).logits.flatten(0, 1)
    torch.nn.functional.cross_entropy(logits, torch.cat(labels).squeeze(1), reduction="sum").backward()
    expected = outputs[0].grad.square().mean(-1)

    torch.testing.assert_close(found[0, group.name][0], expected, rtol=1e-3, atol=1e-7)


def test_batches_that_go_through_together_change_nothing(tmp_path, monkeypatch):
    random_model("llama", tmp_path)
    checkpoint = Checkpoint(tmp_path)
    skeleton = Skeleton(checkpoint.config, CPU, torch.float32)
    batches = random_windows().batches(24)

    together = token_weights(skeleton, checkpoint, batches, 0, Quiet())
    monkeypatch.setattr(backward, "KEPT_BYTES", 1)
    alone = token_weights(skeleton, checkpoint, batches, 0, Quiet())

    assert len(together) == skeleton.block_count * len(skeleton.architecture.groups)
    for key, values in together.items():
        torch.testing.assert_close(torch.cat(values), torch.cat(alone[key]))


def test_products_in_bfloat16_give_nearly_the_same_weights(tmp_path):
    random_model("llama", tmp_path)
    checkpoint = Checkpoint(tmp_path)
    skeleton = Skeleton(checkpoint.config, CPU, torch.float32)
    batches = random_windows().batches(24)

    exact = token_weights(skeleton, checkpoint, batches, 0, Quiet())
    rounded = token_weights(skeleton, checkpoint, batches, 0, Quiet(), torch.bfloat16)

    for key, values in exact.items():
        here, there = torch.cat(values).flatten(), torch.cat(rounded[key]).flatten()
        assert not torch.equal(here, there), "nothing was rounded"
        assert torch.corrcoef(torch.stack([here, there]))[0, 1] > 0.9, key


def test_weights_have_mean_one_over_unmasked_tokens_and_no_outliers():
    squares = [torch.rand(2, 50, generator=torch.Generator().manual_seed(0)) for _ in range(2)]
    squares[0][0, 0] = 1e9
    squares[1][1, 40:] = 1e12
    mask = torch.ones(2, 50, dtype=torch.int64)
    mask[1, 40:] = 0

    weights = normalised(squares, [None, mask])

    kept = torch.cat([weights[0].flatten(), weights[1][mask.bool()]])
    assert float(kept.mean()) == pytest.approx(1, rel=1e-4)
    assert float(kept.min()) >= 0.1 and float(kept.max()) < 3


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_gradients_that_say_nothing_give_equal_weights(bad):
    squares = [torch.full((1, 3), bad)]

    assert torch.equal(normalised(squares, [None])[0], torch.ones(1, 3))
