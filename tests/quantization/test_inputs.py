"""Integer inputs: the arithmetic of W8A8 and LLM.int8, against products taken in int64 and against torch._int_mm."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from compress.quantization.inputs import (
    EXACT_COLUMNS,
    IntegerLinear,
    integer_product,
    padded,
    quantize_inputs,
    rounded_inputs,
    run_as_before,
    run_on_integers,
)


def integers(rows: int, columns: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-128, 128, (rows, columns), dtype=torch.int8, generator=generator)


def test_the_product_stays_exact_inside_a_forward_in_mixed_precision():
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randint(-128, 128, (5, 512), generator=generator).to(torch.int8) for _ in range(2))

    with torch.autocast("cpu", torch.bfloat16):
        found = integer_product(left, right)

    assert torch.equal(found.long(), left.long() @ right.long().T)


@pytest.mark.parametrize("columns", [1, 37, EXACT_COLUMNS, EXACT_COLUMNS + 1, 3 * EXACT_COLUMNS + 5])
def test_the_product_is_that_of_integers_and_of_int_mm_bit_for_bit(columns):
    left, right = integers(19, columns, 1), integers(8, columns, 2)

    product = integer_product(left, right)

    assert product.dtype == torch.int32
    assert torch.equal(product.long(), left.long() @ right.long().T)
    if columns > 1:  # on CPUs with AMX, torch 2.13's _int_mm of a single column returns memory that nobody wrote
        assert torch.equal(product, torch._int_mm(left, right.T.contiguous()))


@pytest.mark.parametrize(("rows", "columns", "outputs"), [(1, 341, 7), (17, 8, 8), (40, 37, 12)])
def test_shapes_that_cuda_does_not_take_are_padded_without_changing_the_product(rows, columns, outputs):
    left, right = integers(rows, columns, 3), integers(outputs, columns, 4)

    wide, tall = padded(left, right)

    assert wide.shape[0] > 16 and wide.shape[1] % 8 == 0 and tall.shape[0] % 8 == 0 and wide.shape[1] == tall.shape[1]
    product = torch._int_mm(wide, tall.T.contiguous())[:rows, :outputs]
    assert torch.equal(product, integer_product(left, right))


def test_the_largest_sums_are_exact():
    left = torch.full((2, 2 * EXACT_COLUMNS), -128, dtype=torch.int8)

    assert integer_product(left, left).tolist() == [[128 * 128 * 2 * EXACT_COLUMNS] * 2] * 2


def test_the_example_of_the_docstring():
    codes, _ = quantize_inputs(torch.tensor([[1.0, -0.5]]))

    assert codes.tolist() == [[127, -64]]
    product = IntegerLinear(torch.tensor([[2, 1]], dtype=torch.int8), torch.tensor([[1.0]]))
    assert product(torch.tensor([[1.0, -0.5]]), None).item() == pytest.approx(190 / 127)


@given(seed=st.integers(0, 50), scale=st.sampled_from([1e-30, 1e-3, 1.0, 1e4]), range_=st.sampled_from([127.0, 127.5]))
def test_rounded_inputs_are_within_half_a_step(seed, scale, range_):
    inputs = torch.randn(3, 5, generator=torch.Generator().manual_seed(seed)) * scale

    step = inputs.abs().amax(-1, keepdim=True) / range_

    assert ((rounded_inputs(inputs, range_) - inputs).abs() <= step * 0.5001).all()


def test_a_token_of_zeros_stays_zero():
    assert torch.equal(rounded_inputs(torch.zeros(2, 4)), torch.zeros(2, 4))


def test_it_is_the_linear_of_rounded_inputs_and_weights():
    generator = torch.Generator().manual_seed(0)
    codes, scale = integers(6, 40, 3), torch.rand(6, 1, generator=generator).half()
    inputs, bias = torch.randn(2, 3, 40, generator=generator), torch.randn(6, generator=generator)

    outputs = IntegerLinear(codes, scale)(inputs, bias)

    expected = rounded_inputs(inputs).double() @ (codes.double() * scale.double()).T + bias
    torch.testing.assert_close(outputs.double(), expected, rtol=1e-5, atol=1e-4)


def test_columns_of_outliers_are_multiplied_as_they_are():
    codes, scale = integers(5, 8, 4), torch.full((5, 1), 0.01)
    inputs = torch.full((4, 8), 0.013)
    inputs[2, 3] = 100.003

    outputs = IntegerLinear(codes, scale, outliers=6.0)(inputs, None)

    exact = inputs @ (codes.float() * scale).T
    assert (outputs - exact).abs().max() < 1e-4, "small inputs share a scale that no outlier stretched"
    plain = IntegerLinear(codes, scale)(inputs, None)
    assert (plain - exact).abs().max() > 1e-2


def test_a_linear_runs_on_integers_until_it_is_told_otherwise():
    linear = nn.Linear(16, 4)
    seen: list[torch.Tensor] = []
    linear.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    inputs = torch.randn(3, 16)
    before = linear(inputs)

    run_on_integers(linear, IntegerLinear(integers(4, 16, 5), torch.ones(4, 1)))
    between = linear(inputs)
    run_as_before(linear)

    assert not torch.allclose(before, between)
    assert torch.equal(linear(inputs), before) and len(seen) == 3
