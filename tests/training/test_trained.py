"""Steps away from stored tensors: nothing moves before the first step, gradients are those of plain autograd."""

from __future__ import annotations

import pytest
import torch

from compress.quantization.grid import Grid, dequantize, quantize
from compress.quantization.grid_search import search_grid
from compress.quantization.scheme import Scheme
from compress.training.quantised import MovedCodes, QuantisedLinear
from compress.training.trained import Adapter, Moved, Trainable, adapted, factors, rates


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
def test_before_the_first_step_a_weight_is_the_stored_one(stored):
    base = torch.randn(5, 7).to(stored)
    moved = Moved(base)

    assert torch.equal(moved.stored(), base) and moved.stored().dtype is stored
    assert torch.equal(moved(), base.float())


def test_a_step_is_in_units_of_the_matrix_and_seen_as_stored():
    base = torch.full((2, 2), 0.5, dtype=torch.float16)
    moved = Moved(base)
    with torch.no_grad():
        moved.factor[0, 0] = 0.1
        moved.factor[0, 1] = 1e-6

    assert moved.unit == pytest.approx(0.5)
    assert float(moved.stored()[0, 0]) == pytest.approx(0.55, abs=1e-3)
    assert float(moved().detach()[0, 1]) == 0.5, "a step smaller than half a float16 is kept, and not seen yet"
    moved().sum().backward()
    torch.testing.assert_close(moved.factor.grad, torch.full((2, 2), 0.5))


def test_codes_can_come_seven_tenths_in_any_number_of_steps_but_few():
    scheme = Scheme(3, True, 8)
    trained = {
        "proj.codes": MovedCodes(torch.zeros(2, 8, dtype=torch.int8), scheme),
        "norm.weight": Moved(torch.ones(3)),
    }

    for way in (35.0, 100.0, 5000.0):
        assert rates(trained, way) == {"proj.codes": pytest.approx(700 / way)}, "and norms at the learning rate"
    assert rates(trained, 5.0) == {"proj.codes": 20.0}


@pytest.mark.parametrize("scheme", [Scheme(3, True, 8), Scheme(4, False, 8)], ids=lambda scheme: scheme.label)
def test_codes_move_by_whole_ones_within_their_range(scheme):
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(6, 24, generator=generator)
    grid = search_grid(weight, None, scheme, torch.float32)
    codes = quantize(weight, grid)
    linear = QuantisedLinear(codes, grid, None, MovedCodes(codes, scheme))
    inputs = torch.randn(4, 24, generator=generator)

    assert torch.equal(linear.moved.stored(), codes)
    torch.testing.assert_close(linear(inputs), inputs @ dequantize(codes, grid).T)

    wanted = torch.randn(4, 6, generator=generator)
    (linear(inputs) * wanted).sum().backward()
    to_weight = (wanted.T @ inputs).view(*grid.scale.shape, -1)
    torch.testing.assert_close(
        linear.moved.factor.grad, (to_weight * grid.scale.unsqueeze(-1)).flatten(1), rtol=1e-5, atol=1e-6
    )

    with torch.no_grad():
        linear.moved.factor[0, :3] = torch.tensor([0.4, 0.6, 100.0])
    moved = linear.moved.stored()
    assert int(moved[0, 0]) == int(codes[0, 0])
    assert int(moved[0, 1]) == min(int(codes[0, 1]) + 1, scheme.highest)
    assert int(moved[0, 2]) == scheme.highest
    torch.testing.assert_close(linear(inputs), inputs @ dequantize(moved, Grid(scheme, grid.scale, grid.zero)).T)


@pytest.mark.parametrize("transposed", [False, True])
def test_low_rank_changes_are_merged_as_the_layer_computes_them(transposed):
    from transformers.pytorch_utils import Conv1D

    block = torch.nn.Module()
    block.proj = Conv1D(6, 8) if transposed else torch.nn.Linear(8, 6, bias=False)
    base = block.proj.weight.data.clone()
    adapted(block, ["proj"], Trainable("lora", rank=2), seed=3, transposed=transposed)
    trained = {"proj.weight": Adapter(base, block.get_submodule("proj"))}

    assert torch.equal(trained["proj.weight"].stored(), base)
    found = factors(trained)
    assert set(found) == {"proj.weight.lora_A", "proj.weight.lora_B"} and rates(trained, 10.0) == {}
    with torch.no_grad():
        for parameter in found.values():
            parameter.copy_(torch.randn(parameter.shape))
    inputs = torch.randn(3, 8)
    merged = trained["proj.weight"].stored()
    bias = block.proj.base_layer.bias if transposed else 0
    expected = inputs @ (merged if transposed else merged.T) + bias
    torch.testing.assert_close(block.proj(inputs), expected, rtol=1e-4, atol=1e-5)


def test_the_first_draw_of_lora_depends_on_the_seed_alone():
    def drawn(seed):
        block = torch.nn.Module()
        block.proj = torch.nn.Linear(8, 6)
        torch.rand(seed + 1)
        adapted(block, ["proj"], Trainable("lora", rank=2), seed=5, transposed=False)
        return block.proj.lora_A["default"].weight

    state = torch.get_rng_state()
    assert torch.equal(drawn(1), drawn(2))
    torch.set_rng_state(state)
