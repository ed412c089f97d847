"""Attention in pieces of queries is torch's with a causal mask, forward and backward, and runs only where it should."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from compress.calibration.products import multiplying_in
from compress.checkpoints import attention
from compress.checkpoints.reader import Checkpoint
from compress.checkpoints.skeleton import Batch, Skeleton
from tests.tiny import random_model

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_amx(monkeypatch):
    """As on a processor that has none, with few threads."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)


def drawn(shared: int, heads: int, tokens: int, size: int = 16, value_size: int = 16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (heads, size), (shared, size), (shared, value_size), (heads, value_size)
    query, key, value, gradient = (
        torch.randn(2, count, tokens, width, generator=generator).mul_(1.5).bfloat16() for count, width in shapes
    )
    return [query, key, value, gradient]


def with_gradients(function, query: Tensor, key: Tensor, value: Tensor, gradient: Tensor) -> list[Tensor]:
    leaves = [each.clone().requires_grad_() for each in (query, key, value)]
    output = function(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, gradient.to(output.dtype))]


def torchs(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


@pytest.mark.parametrize(("key_heads", "heads"), [(1, 4), (2, 6), (3, 3)])
@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 200])
def test_outputs_and_gradients_are_as_close_to_exact_ones_as_those_of_torch(key_heads, heads, tokens):
    given = drawn(key_heads, heads, tokens)

    exact = with_gradients(torchs, *(each.double() for each in given))
    found, usual = with_gradients(attention.in_pieces, *given), with_gradients(torchs, *given)

    for mine, theirs, true in zip(found, usual, exact, strict=True):
        if not true.norm() > 1e-6:  # of one token there is nothing to choose: queries and keys have no gradient
            assert mine.abs().max() < 1e-2
            continue
        error, theirs_error = ((each.double() - true).norm() / true.norm() for each in (mine, theirs))
        assert error < max(5e-3, 1.5 * theirs_error)


def test_values_may_be_of_another_size_than_keys_and_the_scale_another():
    query, key, value, gradient = drawn(2, 4, 130, size=24, value_size=8)

    def exactly(*given: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*given, is_causal=True, enable_gqa=True, scale=0.3)

    exact = with_gradients(exactly, *(each.double() for each in (query, key, value, gradient)))
    found = with_gradients(lambda *given: attention.in_pieces(*given, 0.3), query, key, value, gradient)

    assert all((mine.double() - true).norm() < 6e-3 * true.norm() for mine, true in zip(found, exact, strict=True))


@pytest.fixture
def model(tmp_path) -> Checkpoint:
    random_model("llama", tmp_path / "model", max_position_embeddings=256)
    return Checkpoint(tmp_path / "model")


@pytest.fixture
def runs(monkeypatch) -> list[int]:
    """Tokens of each call of attention in pieces."""
    seen: list[int] = []
    real = attention.in_pieces

    def counted(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
        seen.append(query.shape[2])
        return real(query, key, value, scale)

    monkeypatch.setattr(attention, "in_pieces", counted)
    return seen


def block_output(model: Checkpoint, batch: Batch, products: torch.dtype) -> Tensor:
    skeleton = Skeleton(model.config, CPU, torch.float32)
    hidden = skeleton.embed(model, [batch])[0]
    call = skeleton.call(batch, hidden, 0)
    prefix = skeleton.architecture.block_name(0)
    with torch.no_grad(), skeleton.loaded(model, prefix) as block, multiplying_in(products, skeleton):
        output = block(hidden, *call.args, **call.kwargs)
    return output[0] if isinstance(output, tuple) else output


def test_it_runs_where_linears_multiply_in_bfloat16_and_there_is_no_mask(model, runs, monkeypatch):
    ids = torch.randint(0, int(model.config["vocab_size"]), (2, 150), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, 140:] = 0

    whole = block_output(model, Batch(ids), torch.bfloat16)
    assert runs == [150]
    exact = block_output(model, Batch(ids), torch.float32)
    block_output(model, Batch(ids, mask), torch.bfloat16)
    block_output(model, Batch(ids[:, :64]), torch.bfloat16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    usual = block_output(model, Batch(ids), torch.bfloat16)
    assert runs == [150]

    def off(output: Tensor) -> float:
        return float((output - exact).norm() / exact.norm())

    assert 0 < off(whole) < 1.2 * off(usual)


@pytest.mark.parametrize(
    ("given", "mine"),
    [
        ({}, True),
        ({"scaling": 0.3}, True),
        ({"is_causal": True}, True),
        ({"is_causal": False}, False),
        ({"position_bias": torch.zeros(1, 4, 100, 100)}, False),
        ({"attention_mask": torch.ones(100, 100, dtype=torch.bool).tril()}, False),
    ],
)
def test_arguments_mean_what_they_mean_to_transformers_own(given, mine, runs):
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    query, key, value, _ = drawn(2, 4, 100)
    module = torch.nn.Module()
    module.num_key_value_groups = 2
    given = {"attention_mask": None, **given}

    with torch.autocast("cpu", torch.bfloat16):
        found = attention.attention(module, query, key, value, **given)[0]
        wanted = sdpa_attention_forward(module, query, key, value, **given)[0]

    assert bool(runs) is mine
    assert found.shape == wanted.shape and found.is_contiguous()
    assert (found - wanted).norm() < 6e-3 * wanted.norm()


def test_dropout_and_soft_caps_and_many_threads_are_left_to_torch(runs, monkeypatch):
    query, key, value, _ = drawn(4, 4, 100)
    with torch.autocast("cpu", torch.bfloat16):
        attention.attention(torch.nn.Module(), query, key, value, None, dropout=0.5)
        with pytest.raises(ValueError, match="softcap"):
            attention.attention(torch.nn.Module(), query, key, value, None, softcap=30.0)
        assert attention.faster_here()
        monkeypatch.setattr(torch, "get_num_threads", lambda: attention.MOST_THREADS + 1)
        attention.attention(torch.nn.Module(), query, key, value, None)
    assert not attention.faster_here() and runs == []


def test_in_float32_a_block_computes_what_transformers_own_attention_does(model):
    from transformers import AutoModelForCausalLM

    ids = torch.randint(0, int(model.config["vocab_size"]), (1, 150), generator=torch.Generator().manual_seed(1))
    skeleton = Skeleton(model.config, CPU, torch.float32)
    assert skeleton.config._attn_implementation == attention.NAME
    theirs = AutoModelForCausalLM.from_pretrained(model.folder, attn_implementation="sdpa", dtype=torch.float32)

    with torch.no_grad():
        wanted = theirs(ids, output_hidden_states=True).hidden_states[1]
    assert torch.equal(block_output(model, Batch(ids), torch.float32), wanted)
