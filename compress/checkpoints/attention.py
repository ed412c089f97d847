"""Causal attention on CPUs while linears multiply in bfloat16, a few queries at a time.

torch's kernel for CPUs computes scores above the diagonal too, and reaches 23 GFLOP/s in bfloat16 on a Zen 4 core at
512 tokens, a sixth of what products of matrices do there; its backward pass takes twice its forward. Here scores of 64
queries are formed with the keys up to them, which leaves out nearly all that a causal mask would strike, and heads that
share keys are rows of one product. Scores, their softmax and their gradients are float32; what is summed with them is
bfloat16, as in torch's kernel. Outputs are 2.3e-3 of their norm off exact ones, torch's 1.8e-3; gradients of keys and
values 3e-3, torch's 4e-3 to 9e-3.

transformers looks up attention by name (`AttentionInterface`); the one registered here is torch's wherever it does not
apply: with a mask, outside autocast to bfloat16, with many threads, and on processors with AMX.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

PIECE = 64
"""Queries at a time: of 32, 64 and 128 at 512 tokens the fastest, or as fast as any."""
MOST_THREADS = 4
NAME = "causal_pieces"


def registered() -> str:
    """The name that a config's `_attn_implementation` may have from now on."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attention)
    # No mask where a causal one is all there is to it, as for torch's.
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """query (windows, heads, tokens, size), key and value (windows, shared heads, tokens, size) to (windows, tokens,
    heads, value's size), as transformers' functions of this kind have it."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    special = any(others.get(name) is not None for name in ("softcap", "position_bias", "cache"))
    if attention_mask is None and causal and not dropout and not special and applies_to(query, key):
        with torch.autocast("cpu", enabled=False):
            found = in_pieces(query.bfloat16(), key.bfloat16(), value.bfloat16(), scaling)
        return found.transpose(1, 2).contiguous(), None
    given: Any = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, **others}
    return sdpa_attention_forward(module, query, key, value, attention_mask, **given)  # type: ignore[no-any-return]


def applies_to(query: Tensor, key: Tensor) -> bool:
    """Whether these are whole texts on a CPU that multiplies in bfloat16, and `faster_here`."""
    tokens = query.shape[2]
    return (
        query.device.type == "cpu"
        and torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") is torch.bfloat16
        and faster_here()
        and key.shape[2] == tokens > PIECE
        and query.shape[1] % key.shape[1] == 0
    )


def faster_here() -> bool:
    """Whether pieces are faster than torch's kernel: not with AMX, which that uses, nor with many threads, among which
    it shares out whole heads and not each small product. Measured with one and two."""
    return not torch.cpu._is_amx_tile_supported() and torch.get_num_threads() <= MOST_THREADS


def in_pieces(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
    """softmax(scale query key^T) value with a causal mask: bfloat16 (windows, heads, tokens, value's size), for query
    (windows, heads, tokens, size), key and value (windows, shared heads, tokens, size) in bfloat16 too. A scale of None
    is 1 / sqrt(size)."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return _InPieces.apply(query, key, value, scale)  # type: ignore[no-any-return,no-untyped-call]


class _InPieces(torch.autograd.Function):
    """Keeps what it was given and its output; the backward pass forms the probabilities again."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        windows, heads, tokens, _ = query.shape
        shared = key.shape[1]
        output = query.new_empty(windows, heads, tokens, value.shape[-1])
        turned = key.float().transpose(-1, -2)
        for start in range(0, tokens, PIECE):
            stop = min(tokens, start + PIECE)
            likely = _probabilities(_together(query[:, :, start:stop], shared), turned[..., :stop], start, scale)
            found = torch.matmul(likely.bfloat16(), value[:, :, :stop])
            output[:, :, start:stop] = found.view(windows, heads, stop - start, -1)
        ctx.save_for_backward(query, key, value, output)
        ctx.scale = scale
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast("cpu", enabled=False):
            query, key, value, output = ctx.saved_tensors
            return (*_gradients(query, key, value, output, gradient, ctx.scale), None)


def _together(piece: Tensor, shared: int) -> Tensor:
    """(windows, heads, queries, size) -> (windows, shared heads, queries of all heads that share, size)."""
    windows, _, _, size = piece.shape
    return piece.reshape(windows, shared, -1, size)


def _probabilities(query: Tensor, turned: Tensor, start: int, scale: float) -> Tensor:
    """float32 (windows, shared heads, queries of all heads that share, keys) of queries from `start` on, whose last
    `queries` keys are their own; `turned` float32 (windows, shared heads, size, keys)."""
    scores = torch.matmul(query.float(), turned).mul_(scale)
    keys = turned.shape[-1]
    queries = keys - start
    later = torch.ones(queries, queries, dtype=torch.bool).triu_(1)
    scores.view(*scores.shape[:2], -1, queries, keys)[..., start:].masked_fill_(later, -torch.inf)
    return scores.softmax(-1)


def _gradients(
    query: Tensor, key: Tensor, value: Tensor, output: Tensor, gradient: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Of query, key and value, for the output's."""
    shared = key.shape[1]
    turned, turned_value = key.float().transpose(-1, -2), value.float().transpose(-1, -2)
    # sum over keys of p dp, which is what the softmax takes off: of one query it is its output times its gradient.
    common = (gradient.float() * output.float()).sum(-1, keepdim=True)
    of_query = torch.empty_like(query)
    of_key, of_value = (torch.zeros_like(each, dtype=torch.float32) for each in (key, value))
    for start in range(0, query.shape[2], PIECE):
        stop = min(query.shape[2], start + PIECE)
        piece, outer, less = (_together(each[:, :, start:stop], shared) for each in (query, gradient, common))
        likely = _probabilities(piece, turned[..., :stop], start, scale)
        of_value[:, :, :stop] += torch.matmul(likely.bfloat16().transpose(-1, -2), outer)
        of_scores = torch.matmul(outer.float(), turned_value[..., :stop]).sub_(less).mul_(likely).mul_(scale).bfloat16()
        of_query[:, :, start:stop] = torch.matmul(of_scores, key[:, :, :stop]).view_as(query[:, :, start:stop])
        of_key[:, :, :stop] += torch.matmul(of_scores.transpose(-1, -2), piece)
    return of_query, of_key.to(key.dtype), of_value.to(value.dtype)
