"""KL divergence of a student's logits from a teacher's, and its gradient, without ever holding all logits.

Notation: p, q the two models' probabilities of the next token, u the student's logits before the soft cap c (Gemma 2;
none elsewhere), z = c tanh(u / c) after it, W the student's head, h its final hidden state:

    KL(p || q) = sum p (log p - log q)     dKL/dz = q - p     dz/du = 1 - (z / c)^2     dKL/dh = W^T dKL/du

Logits of a few tokens are formed at a time, reduced to one number and one gradient row a token, and dropped. The
gradient is computed in the forward pass, while the logits are there; the backward pass only scales it.

Where training multiplies in bfloat16 and both heads are one (or an export has rounded a float32 source's), the
student's logits are the teacher's u and W (h - h~), h~ the teacher's state. A product in bfloat16 rounds its sums,
logits of 20 by 0.04; here the divergence sees roundings of the *difference*, and p is off by as much in both terms.
Judging is in float32.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from compress.checkpoints.skeleton import Head
from compress.training.material import Material

TOKENS_AT_ONCE = 128
"""Tokens whose logits are formed at a time: with a vocabulary of 128k, 64 MiB a matrix in float32."""
ROWS_AT_ONCE = 4096
"""Of two heads that are compared."""


@torch.no_grad()
def divergences(teacher: tuple[Head, Tensor], student: tuple[Head, Tensor]) -> Tensor:
    """KL divergence of each token in nats, (tokens,) float32. Tensors are normed final states (tokens, hidden)."""
    pieces = [_chunk(teacher, student, start)[0] for start in range(0, len(student[1]), TOKENS_AT_ONCE)]
    return torch.cat(pieces)


def held_out_divergence(
    material: Material, heads: tuple[Head, Head], states: Iterable[tuple[Tensor, Tensor, Tensor]]
) -> float:
    """Mean divergence in nats over all counted tokens.

    heads: (teacher's, student's); states: (rows, teacher's, student's) per batch, normed (rows, tokens, hidden).
    """
    total, tokens = 0.0, 0
    for rows, wanted, got in states:
        counts = material.counts(rows)
        if bool(counts.any()):
            values = divergences((heads[0], wanted[counts]), (heads[1], got[counts]))
            total, tokens = total + float(values.double().sum()), tokens + len(values)
    return total / max(1, tokens)


def mean_divergence(teacher: tuple[Head, Tensor], student: tuple[Head, Tensor], narrow: Tensor | None = None) -> Tensor:
    """Mean of `divergences`, a scalar that passes gradients to the student's states (tokens, hidden), tokens > 0.

    `narrow`: the weight of both heads, which are `alike_in_bfloat16`, in that, to multiply with."""
    mean: Tensor = _MeanDivergence.apply(student[1], teacher, student[0], narrow)  # type: ignore[no-untyped-call]
    return mean


def alike_in_bfloat16(first: Tensor, second: Tensor) -> bool:
    """Whether two weights (rows, columns) differ by no more than bfloat16 rounds, or float16's smallest step.

    float16 rounds a float32 head by an eighth of that, integers of a quantised one move it by far more."""
    pairs = zip(torch.split(first, ROWS_AT_ONCE), torch.split(second, ROWS_AT_ONCE), strict=True)
    return first is second or all(torch.allclose(*pair, rtol=2**-8, atol=2**-24) for pair in pairs)


class _MeanDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, teacher: tuple[Head, Tensor], head: Head, narrow: Tensor | None) -> Tensor:
        gradient = torch.empty_like(states)
        total = torch.zeros((), dtype=torch.float64, device=states.device)
        weight = head.weight if narrow is None else narrow
        for start in range(0, len(states), TOKENS_AT_ONCE):
            if narrow is None:
                values, to_logits = _chunk(teacher, (head, states), start)
            else:
                values, to_logits = _narrow_chunk(teacher[1], states, head, narrow, start)
            total += values.sum(dtype=torch.float64)
            gradient[start : start + len(values)] = (to_logits / len(states)).to(weight.dtype) @ weight
        ctx.save_for_backward(gradient)
        return (total / len(states)).float()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0], None, None, None


def _chunk(teacher: tuple[Head, Tensor], student: tuple[Head, Tensor], start: int) -> tuple[Tensor, Tensor]:
    """Divergences (tokens,) and their gradients to the uncapped logits (tokens, vocabulary) of one chunk, float32."""
    part = slice(start, start + TOKENS_AT_ONCE)
    return _compared(teacher[0].logits(teacher[1][part]), student[0].logits(student[1][part]), student[0].softcap)


def _narrow_chunk(wanted: Tensor, states: Tensor, head: Head, narrow: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """The same of a head that both have, `wanted` and `states` the teacher's and the student's (tokens, hidden)."""
    part = slice(start, start + TOKENS_AT_ONCE)
    first, second = wanted[part], states[part]
    uncapped = torch.nn.functional.linear(first.to(narrow), narrow).float()
    if head.bias is not None:
        uncapped += head.bias.float()
    moved = torch.nn.functional.linear((second - first).to(narrow), narrow).float().add_(uncapped)
    return _compared(head.capped(uncapped), head.capped(moved), head.softcap)


def _compared(wanted: Tensor, logits: Tensor, cap: float | None) -> tuple[Tensor, Tensor]:
    """As `_chunk`, of the teacher's logits and the student's (tokens, vocabulary), both capped."""
    log_p, log_q = wanted.log_softmax(-1), logits.log_softmax(-1)
    p = log_p.exp()
    values = (p * (log_p - log_q)).sum(-1).clamp_min_(0)
    to_logits = log_q.exp_().sub_(p)
    if cap is not None:
        to_logits *= 1 - (logits / cap).square()
    return values, to_logits
