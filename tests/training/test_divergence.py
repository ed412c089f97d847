"""The divergence in chunks, against one softmax over everything."""

from __future__ import annotations

import pytest
import torch

from compress.checkpoints.skeleton import Head
from compress.training import divergence
from compress.training.divergence import divergences, mean_divergence


def _whole(teacher, student):
    """Per token, with autograd, from full logits."""
    logits = []
    for head, states in (teacher, student):
        each = states @ head.weight.T + (0 if head.bias is None else head.bias)
        logits.append(each if head.softcap is None else torch.tanh(each / head.softcap) * head.softcap)
    return torch.nn.functional.kl_div(
        logits[1].log_softmax(-1), logits[0].log_softmax(-1), reduction="none", log_target=True
    ).sum(-1)


@pytest.mark.parametrize("softcap", [None, 1.5], ids=["plain", "capped"])
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunks_give_the_value_and_the_gradient_of_the_whole(softcap, chunk, monkeypatch):
    monkeypatch.setattr(divergence, "TOKENS_AT_ONCE", chunk)
    generator = torch.Generator().manual_seed(3)
    weight, bias = torch.randn(50, 16, generator=generator), torch.randn(50, generator=generator)
    teacher = (
        Head(torch.nn.Identity(), weight + 0.1, bias, softcap),
        torch.randn(20, 16, generator=generator),
    )
    states = teacher[1] + 0.3 * torch.randn(20, 16, generator=generator)
    head = Head(torch.nn.Identity(), weight, bias, softcap)
    first, second = states.clone().requires_grad_(), states.clone().requires_grad_()

    mean = mean_divergence(teacher, (head, first))
    (3 * mean).backward()
    whole = _whole(teacher, (head, second))
    (3 * whole.mean()).backward()

    torch.testing.assert_close(mean.detach(), whole.mean().detach())
    torch.testing.assert_close(first.grad, second.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(divergences(teacher, (head, states)), whole.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("softcap", [None, 20.0], ids=["plain", "capped"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk", [7, 64])
def test_a_head_in_bfloat16_sees_small_differences_of_large_logits(softcap, bias, chunk, monkeypatch):
    """Logits of about 20, of which bfloat16 keeps 0.06, and differences of about 0.1."""
    monkeypatch.setattr(divergence, "TOKENS_AT_ONCE", chunk)
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(500, 64, generator=generator)
    head = Head(torch.nn.Identity(), weight, torch.randn(500, generator=generator) if bias else None, softcap)
    wanted = 1.5 * torch.randn(40, 64, generator=generator)
    states = wanted + 0.01 * torch.randn(40, 64, generator=generator)

    def found(narrow):
        leaf = states.clone().requires_grad_()
        mean = mean_divergence((head, wanted), (head, leaf), narrow)
        (2 * mean).backward()
        return float(mean.detach()), leaf.grad

    (exact, gradient), (value, rounded) = found(None), found(weight.bfloat16())
    assert value == pytest.approx(exact, rel=0.05) and value != exact
    assert (rounded - gradient).norm() < 0.05 * gradient.norm()
    # Each model's logits rounded by themselves would be another matter.
    coarse = Head(head.norm, weight.bfloat16(), None if head.bias is None else head.bias.bfloat16(), softcap)
    assert abs(float(divergences((coarse, wanted), (coarse, states)).mean()) - exact) > 5 * abs(value - exact)
