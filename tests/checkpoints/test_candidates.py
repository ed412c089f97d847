"""Candidates as they are kept: what is read back is what was written, in as many bytes as are said."""

from __future__ import annotations

import pytest
import torch

from compress.checkpoints import candidates
from compress.checkpoints.candidates import Assigned, kept_bytes, write_candidates
from compress.quantization.grid import Grid, dequantize
from compress.quantization.scheme import Scheme
from tests.tiny import random_model

DOWN, UP = "model.layers.1.mlp.down_proj", "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_every_code_comes_back(tmp_path, bits, symmetric):
    random_model("llama", tmp_path, torch.float16)
    scheme = Scheme(bits, symmetric, 32)
    rows, columns = 64, 96
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(scheme.lowest, scheme.highest + 1, (rows, columns), generator=generator, dtype=torch.int8)
    scale = torch.rand(rows, 3, generator=generator).half() + 0.5
    zero = None if symmetric else torch.randint(-2, 2, (rows, 3), generator=generator, dtype=torch.int8)
    write_candidates(tmp_path, 1, {DOWN: [None, (codes, Grid(scheme, scale, zero))]})

    chosen = Assigned(tmp_path, {DOWN: [None, scheme]}, {DOWN: 1})
    found, grid = chosen.codes(DOWN)
    assert found.dtype == torch.int8 and torch.equal(found, codes)
    assert torch.equal(chosen.dense(DOWN), dequantize(codes, grid))
    assert torch.equal(chosen.dense_state("model.layers.1")["mlp.down_proj.weight"], dequantize(codes, grid))
    plain = Assigned(tmp_path, {DOWN: [None, scheme]}, {DOWN: 0})
    assert DOWN not in plain.schemes and torch.equal(plain.dense(DOWN), plain.read(f"{DOWN}.weight"))

    size = candidates._path(tmp_path, 1).stat().st_size
    scales = rows * 3 * (2 if symmetric else 3)
    assert kept_bytes(scheme, rows, columns) == rows * columns // (2 if bits <= 4 else 1)
    assert 0 <= size - kept_bytes(scheme, rows, columns) - scales < 1024


def test_an_odd_number_of_columns_is_kept_a_byte_a_code(tmp_path):
    random_model("llama", tmp_path, torch.float16)
    scheme = Scheme(4, True, None)
    codes = torch.arange(-8, 7, dtype=torch.int8).view(1, 15).repeat(4, 1)
    write_candidates(tmp_path, 1, {UP: [(codes, Grid(scheme, torch.ones(4, 1).half(), None))]})
    assert torch.equal(Assigned(tmp_path, {UP: [scheme]}, {UP: 0}).codes(UP)[0], codes)
    assert kept_bytes(scheme, 4, 15) == 60
