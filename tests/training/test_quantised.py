"""A linear of codes and trained scales, against autograd through its weight written out."""

from __future__ import annotations

import pytest
import torch

from compress.quantization.grid import dequantize, quantize
from compress.quantization.grid_search import search_grid
from compress.quantization.k_quants import k_quant_grid
from compress.quantization.scheme import Scheme
from compress.quantization.super_blocks import SuperBlocks
from compress.training.quantised import NEAREST_TO_EDGE, MovedCodes, QuantisedLinear, towards

SCHEMES = [Scheme(3, True, 8), Scheme(4, False, 8), Scheme(2, True, None), Scheme(4, False, None)]


def _linear(scheme, stored, compute=torch.float32):
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(6, 24, generator=generator)
    grid = search_grid(weight, None, scheme, stored)
    inputs = torch.randn(2, 5, 24, generator=generator).to(compute)
    bias = torch.randn(6, generator=generator).to(compute)
    return QuantisedLinear(quantize(weight, grid), grid, bias), grid, inputs


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.label)
def test_gradients_equal_autograd_through_plain_dequantisation(scheme):
    """With scales stored in float32 nothing is rounded, and autograd can go through the product itself."""
    linear, grid, inputs = _linear(scheme, torch.float32)
    inputs.requires_grad_()
    wanted = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(2))

    (linear(inputs) * wanted).sum().backward()
    found, found_inputs = linear.scale.factor.grad, inputs.grad

    factor = torch.zeros_like(grid.scale, requires_grad=True)
    integers = linear.codes.float().view(*grid.scale.shape, -1)
    if grid.zero is not None:
        integers = integers - grid.zero.float().unsqueeze(-1)
    weight = (integers * (grid.scale * (1 + factor)).unsqueeze(-1)).flatten(1)
    again = inputs.detach().requires_grad_()
    (torch.nn.functional.linear(again, weight, linear.bias) * wanted).sum().backward()

    torch.testing.assert_close(found, factor.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found_inputs, again.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_gradients_of_super_blocks_equal_autograd_through_their_integers(bits):
    generator = torch.Generator().manual_seed(bits)
    # Scales of a super-block may lie below float16's normal numbers.
    weight = torch.randn(6, 512, generator=generator) * (2e-3 if bits == 6 else 1)
    grid = k_quant_grid(weight, None, Scheme.of_k_quant(bits))
    assert isinstance(grid.nested, SuperBlocks)
    assert (float(grid.nested.scale.float().abs().max()) < 2.0**-14) == (bits == 6)
    linear = QuantisedLinear(quantize(weight, grid), grid, None)
    inputs = torch.randn(2, 5, 512, generator=generator).requires_grad_()
    wanted = torch.randn(2, 5, 6, generator=generator)

    output = linear(inputs)
    (output * wanted).sum().backward()

    factor = torch.zeros(6, 2, requires_grad=True)
    minima = grid.nested.group_minima()
    integers = (linear.codes.float() - (0 if minima is None else grid.scheme.lowest)).view(
        6, 2, -1, grid.scheme.group_size
    )
    scale = (grid.nested.scale.float() * (1 + factor)).view(6, 2, 1, 1) * grid.nested.scales.view(6, 2, -1, 1)
    values = scale * integers - (0 if minima is None else minima.view(6, 2, -1, 1))
    again = inputs.detach().requires_grad_()
    expected = again @ values.reshape(6, 512).T
    (expected * wanted).sum().backward()

    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(linear.scale.factor.grad, factor.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(inputs.grad, again.grad, rtol=1e-4, atol=1e-4)


def test_the_example_of_the_docstring():
    from compress.quantization.grid import Grid

    codes = torch.tensor([[7, -8]], dtype=torch.int8)
    linear = QuantisedLinear(codes, Grid(Scheme(4, True, None), torch.tensor([[0.1]]), None), None)

    output = linear(torch.tensor([[1.0, 2.0]]))
    output.sum().backward()

    assert float(output.detach()) == pytest.approx(-0.9)
    # The gradient of the factor is that of the scale times the scale.
    assert float(linear.scale.factor.grad) == pytest.approx(-9 * 0.1)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_the_output_is_that_of_the_values_a_loader_computes(stored):
    linear, grid, inputs = _linear(Scheme(4, False, 8), stored)
    with torch.no_grad():
        linear.scale.factor.add_(0.013)

    from dataclasses import replace

    values = dequantize(linear.codes, replace(grid, scale=linear.scale.stored())).float()
    assert torch.equal(linear(inputs), inputs @ values.T + linear.bias)


def test_what_is_kept_between_the_passes_is_the_input_and_no_weight():
    linear, _, inputs = _linear(Scheme(4, True, 8), torch.float16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        linear(inputs)

    floats = [tuple(tensor.shape) for tensor in kept if tensor.is_floating_point()]
    assert tuple(inputs.shape) in floats
    assert (6, 24) not in floats and (24, 6) not in floats


def test_bfloat16_activations_still_give_float32_gradients():
    linear, _, inputs = _linear(Scheme(4, True, 8), torch.bfloat16, torch.bfloat16)

    output = linear(inputs)
    output.float().sum().backward()

    assert output.dtype is torch.bfloat16
    assert linear.scale.factor.grad.dtype is torch.float32 and bool(linear.scale.factor.grad.any())


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.label)
def test_trained_codes_start_towards_the_weight_without_leaving_their_place(scheme):
    weight = torch.randn(6, 24, generator=torch.Generator().manual_seed(1))
    grid = search_grid(weight, None, scheme, torch.float16)
    codes = quantize(weight, grid)

    start = towards(codes, grid, weight)

    assert float(start.abs().max()) <= NEAREST_TO_EDGE + 1e-6
    assert torch.equal(MovedCodes(codes, scheme, start).stored(), codes), "the forward pass does not see a start"
    inside = start.abs() < 0.99 * NEAREST_TO_EDGE
    lost = (weight - dequantize(codes, grid).float()) / grid.scale.float().repeat_interleave(
        24 // grid.scale.shape[1], dim=1
    )
    torch.testing.assert_close(start[inside], 0.5 * lost[inside], rtol=1e-2, atol=1e-2)
    assert bool(inside.any()) and bool((start != 0).any())
