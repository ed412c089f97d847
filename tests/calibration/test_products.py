"""Products in bfloat16 while training: gradients point the same way, and nothing else is rounded."""

from __future__ import annotations

import pytest
import torch

from compress.calibration import products
from compress.checkpoints.skeleton import Skeleton
from compress.stages import Recover, RoundToNearest
from compress.training.quantised import QuantisedLinear
from tests.tiny import CONFIGS, CPU, apply_stage, config_of, random_model, random_windows


@pytest.mark.parametrize(("units", "expected"), [("amx", "bfloat16"), ("avx512", "bfloat16"), ("", "float32")])
def test_auto_is_bfloat16_where_the_cpu_has_units_for_it(monkeypatch, units, expected):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: units == "amx")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: units == "avx512")
    assert products.chosen("auto", CPU, torch.float32) is getattr(torch, expected)
    assert products.chosen("float32", CPU, torch.float32) is torch.float32
    assert products.chosen("auto", torch.device("cuda"), torch.float32) is torch.float32


def test_gradients_of_a_quantised_linear_are_those_of_float32_but_for_bfloat16(tmp_path):
    from compress.quantization.grid import quantize
    from compress.quantization.grid_search import search_grid
    from compress.quantization.scheme import Scheme

    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    grid = search_grid(weight, None, Scheme(4, True, 32), torch.float16)
    inputs = torch.randn(16, 64, generator=torch.Generator().manual_seed(1))
    config = config_of("llama").to_dict()
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        linear, x = QuantisedLinear(quantize(weight, grid), grid, None), inputs.clone().requires_grad_()
        with products.multiplying_in(dtype, Skeleton(config, CPU, torch.float32)):
            output = linear(x)
        assert output.dtype is dtype
        output.float().square().sum().backward()
        found[dtype] = [x.grad, *(factor.grad for factor in linear.scale.factors().values())]
        assert all(gradient.dtype is torch.float32 for gradient in found[dtype])
    for single, half in zip(found[torch.float32], found[torch.bfloat16], strict=True):
        assert 0 < float((single - half).norm() / single.norm()) < 1e-2


@pytest.mark.parametrize("what", ["scales+norms", "codes"])
@pytest.mark.parametrize("mode", ["model", "block"])
def test_a_quantised_model_is_recovered_in_either(tmp_path, what, mode):
    random_model("llama", tmp_path / "model", torch.float16)
    windows = random_windows(16)
    apply_stage(RoundToNearest(bits=3, group_size=32), tmp_path / "model", tmp_path / "rounded")
    kl = {}
    for dtype in ("float32", "bfloat16"):
        stage = Recover(train=what, mode=mode, products=dtype, epochs=4, batch_tokens=96, learning_rate=5e-3)
        _, outcome = apply_stage(stage, tmp_path / "rounded", tmp_path / dtype, windows, origin=tmp_path / "model")
        assert outcome.facts["products"] == dtype
        kl[dtype] = outcome.facts["held_out_kl_before"], outcome.facts["held_out_kl_after"]
    # Judged in float32 either way: the start is the same number, and the end nearly.
    assert kl["float32"][0] == kl["bfloat16"][0]
    gained = [before - after for before, after in kl.values()]
    assert gained[0] > 0 and gained[1] == pytest.approx(gained[0], rel=0.1)


@pytest.mark.parametrize("name", CONFIGS)
def test_weights_of_every_architecture_train_in_bfloat16(tmp_path, name):
    random_model(name, tmp_path / "model", torch.float16)
    random_model(name, tmp_path / "other", torch.float16, seed=1)
    stage = Recover(train="weights", products="bfloat16", epochs=1, batch_tokens=96, learning_rate=1e-2)
    _, outcome = apply_stage(
        stage, tmp_path / "other", tmp_path / "done", random_windows(8, padded=True), origin=tmp_path / "model"
    )
    assert outcome.facts["held_out_kl_after"] < 0.99 * outcome.facts["held_out_kl_before"]
