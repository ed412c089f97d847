"""Formats that only their own loader reads: their matrices by what each linear does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from compress.checkpoints.foreign import matrix_of, readable_as, write_dense
from compress.checkpoints.reader import Checkpoint
from compress.errors import RecipeError
from compress.events import Quiet
from tests.helpers import changed, write_recipe


class Packed(nn.Module):
    """A linear that keeps its weight as bytes, with a bias."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.step = nn.Parameter(torch.tensor(0.125, dtype=torch.float16), requires_grad=False)
        self.codes = nn.Buffer((weight / 0.125).round().to(torch.int8))
        self.bias = None if bias is None else nn.Parameter(bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x @ (self.codes.to(x.dtype) * self.step).T
        return y if self.bias is None else y + self.bias


@pytest.mark.parametrize("columns", [3, 512, 1030])
@pytest.mark.parametrize("biased", [True, False])
def test_a_linear_is_its_matrix_whatever_it_keeps(columns: int, biased: bool) -> None:
    torch.manual_seed(0)
    weight = torch.randint(-8, 8, (5, columns)) * 0.125
    linear = Packed(weight, torch.randn(5).half() if biased else None)
    assert torch.equal(matrix_of(linear, (5, columns)).float(), weight)
    assert (linear.bias is not None) == biased


def test_a_linear_of_another_shape_is_refused() -> None:
    with pytest.raises(RecipeError, match="gives"):
        matrix_of(Packed(torch.zeros(5, 4), None), (6, 4))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, glass: Path) -> Path:
    """Where configs can be changed: glass in links."""
    folder = tmp_path_factory.mktemp("foreign")
    for path in glass.iterdir():
        if path.name != "config.json":
            (folder / path.name).symlink_to(path.resolve())
    return folder


def described(folder: Path, glass: Path, section: dict[str, object] | None) -> Checkpoint:
    config = json.loads((glass / "config.json").read_text(encoding="utf-8"))
    if section is not None:
        config["quantization_config"] = section
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return Checkpoint(folder)


def groups(**changes: object) -> dict[str, object]:
    weights = {"num_bits": 4, "symmetric": True, "strategy": "group", "group_size": 32}
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": None,
        "format": "pack-quantized",
        **changes,
    }
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group}}


def test_what_our_reader_takes_and_what_needs_its_own_loader(folder: Path, glass: Path) -> None:
    assert readable_as(described(folder, glass, None)) == "itself"
    assert readable_as(described(folder, glass, groups())) == "itself"
    assert readable_as(described(folder, glass, groups(format="int-quantized"))) == "loaded"
    assert readable_as(described(folder, glass, {"quant_method": "gptq", "bits": 4})) == "loaded"


@pytest.mark.parametrize(
    ("section", "said"),
    [
        (groups(input_activations={"num_bits": 8}), "activations are quantised too"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "activations are quantised too"),
        ({"quant_method": "fp8"}, "'fp8' is not known"),
    ],
)
def test_weights_that_are_not_the_whole_model_are_refused(folder: Path, glass: Path, section, said) -> None:
    with pytest.raises(RecipeError, match=said):
        readable_as(described(folder, glass, section))


def test_what_is_written_dense_is_what_our_reader_reads(glass_recipe, here, tmp_path: Path) -> None:
    stages = [{"kind": "round_to_nearest", "bits": 4, "group_size": "channel"}]
    recipe = write_recipe(tmp_path / "r.yaml", changed(glass_recipe, stages=stages, calibration=None))
    ended = here("run", recipe, "--store", tmp_path / "store")
    assert ended.code in (0, 3), ended.err
    model = next((tmp_path / "store").rglob("model"))
    target = tmp_path / "dense"
    target.mkdir()
    write_dense(model, target, Quiet())
    packed, dense = Checkpoint(model), Checkpoint(target)
    assert packed.schemes and not dense.schemes and "quantization_config" not in dense.config
    for module in packed.schemes:
        assert torch.equal(packed.dense(module).float(), dense.read(f"{module}.weight").float()), module
