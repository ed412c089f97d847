"""A trained tensor is seen as it will be stored, and starts as it was."""

from __future__ import annotations

import pytest
import torch

from compress.training.relative import Relative


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_an_untrained_tensor_is_the_stored_one_bit_for_bit(stored, offset):
    base = (torch.randn(40, generator=torch.Generator().manual_seed(0)) * 0.1).to(stored)

    assert torch.equal(Relative(base, offset).stored(), base)


def test_the_forward_pass_sees_the_sixteen_bits_and_the_gradient_passes_the_rounding():
    trained = Relative(torch.ones(3, dtype=torch.float16))
    with torch.no_grad():
        trained.factor.copy_(torch.tensor([0.0003, 0.0006, 0.01]))

    value = trained()
    value.sum().backward()

    spacing = 2.0**-10
    assert value.tolist() == [1.0, 1 + spacing, 1 + 10 * spacing]
    assert torch.equal(value.to(torch.float16), trained.stored())
    assert trained.factor.grad.tolist() == [1.0, 1.0, 1.0]


def test_a_factor_changes_a_norm_by_what_it_multiplies_with():
    """Gemma's weight 0.25 multiplies by 1.25; a tenth more is 1.375, a weight of 0.375."""
    trained = Relative(torch.tensor([0.25], dtype=torch.bfloat16), offset=1.0)
    with torch.no_grad():
        trained.factor.fill_(0.1)

    assert trained().tolist() == [0.375]


def test_a_scale_never_becomes_zero_or_infinite():
    trained = Relative(torch.tensor([0.5, -0.5], dtype=torch.float16), nonzero=True)
    with torch.no_grad():
        trained.factor.copy_(torch.tensor([-1.0, 1e9]))

    stored = trained.stored()

    assert bool((stored != 0).all()) and bool(torch.isfinite(stored).all())
