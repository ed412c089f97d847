"""Bytes of the K-quants' super-blocks, 256 columns each: integers, codes and float16s in llama.cpp's order.

With q the code from 0 on, c the groups' integers and m their second ones (`quantization.super_blocks`):

    Q2_K   c and m in a byte (16), q two bits (64), d, e
    Q3_K   q's third bit (32), its first two (64), c + 32 in 6 bits (12), d
    Q4_K   d, e, c and m in 6 bits (12), q four bits (128)
    Q5_K   d, e, c and m in 6 bits (12), q's fifth bit (32), its first four (128)
    Q6_K   q's first four bits (128), its last two (64), c in a byte (16), d

Source: ggml-common.h and quantize_row_q2_K_ref to quantize_row_q6_K_ref in ggml-quants.c of llama.cpp.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.quantization.grid import Grid
from compress.quantization.super_blocks import SUPER, SuperBlocks


def super_blocks(codes: Tensor, grid: Grid) -> Tensor:
    """Bytes uint8 (rows, bytes of a row) of codes int8 (rows, columns) on a K-quant's grid."""
    made_of, layout = grid.nested, grid.scheme.k_quant
    assert isinstance(made_of, SuperBlocks) and layout is not None
    q = (codes.to(torch.int16) - grid.scheme.lowest).view(-1, SUPER)
    c = made_of.integers.reshape(len(q), -1).to(torch.int16)
    d = made_of.scale.reshape(-1, 1).contiguous().view(torch.uint8)
    if made_of.minimum is None or made_of.minima is None:
        parts = {3: _q3, 6: _q6}[grid.scheme.bits](q, c, d)
    else:
        m = made_of.minima.reshape(len(q), -1).to(torch.int16)
        de = torch.cat([d, made_of.minimum.reshape(-1, 1).contiguous().view(torch.uint8)], dim=1)
        parts = {2: _q2, 4: _q4, 5: _q5}[grid.scheme.bits](q, c, m, de)
    return torch.cat([part.to(torch.uint8) for part in parts], dim=1).view(len(codes), -1)


def _q2(q: Tensor, c: Tensor, m: Tensor, de: Tensor) -> list[Tensor]:
    return [c | m << 4, _by_four(q), de]


def _q3(q: Tensor, c: Tensor, d: Tensor) -> list[Tensor]:
    third = ((q >> 2).view(-1, 8, 32) << torch.arange(8).view(8, 1)).sum(1)
    six = c + 32
    low = six[:, :8] & 15 | (six[:, 8:] & 15) << 4
    high = ((six >> 4).view(-1, 4, 4) << torch.arange(0, 8, 2).view(4, 1)).sum(1)
    return [third, _by_four(q & 3), low, high, d]


def _q4(q: Tensor, c: Tensor, m: Tensor, de: Tensor) -> list[Tensor]:
    return [de, _six_bits(c, m), _by_two(q)]


def _q5(q: Tensor, c: Tensor, m: Tensor, de: Tensor) -> list[Tensor]:
    fifth = ((q >> 4).view(-1, 8, 32) << torch.arange(8).view(8, 1)).sum(1)
    return [de, _six_bits(c, m), fifth, _by_two(q & 15)]


def _q6(q: Tensor, c: Tensor, d: Tensor) -> list[Tensor]:
    quarters = q.view(-1, 2, 4, 32)
    low = quarters & 15
    four = torch.stack([low[:, :, 0] | low[:, :, 2] << 4, low[:, :, 1] | low[:, :, 3] << 4], dim=2)
    two = ((quarters >> 4) << torch.arange(0, 8, 2).view(4, 1)).sum(2)
    return [four.flatten(1), two.flatten(1), c & 255, d]


def _by_four(q: Tensor) -> Tensor:
    """Two bits each: of 128 columns, those 32 apart share a byte."""
    return (q.view(-1, 2, 4, 32) << torch.arange(0, 8, 2).view(4, 1)).sum(2).flatten(1)


def _by_two(q: Tensor) -> Tensor:
    """Four bits each: of 64 columns, those 32 apart share a byte."""
    halves = q.view(-1, 4, 2, 32)
    return (halves[:, :, 0] | halves[:, :, 1] << 4).flatten(1)


def _six_bits(c: Tensor, m: Tensor) -> Tensor:
    """Eight pairs of six bits in 12 bytes: the first four c with the last four's upper bits, the first four m likewise,
    then the last four's lower bits."""
    upper_c, upper_m = c[:, 4:] >> 4 << 6, m[:, 4:] >> 4 << 6
    return torch.cat([c[:, :4] | upper_c, m[:, :4] | upper_m, c[:, 4:] & 15 | (m[:, 4:] & 15) << 4], dim=1)
