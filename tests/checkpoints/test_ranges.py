"""A weight that loaders would make infinite is refused, whatever the format writes of it."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.checkpoints.export import export
from compress.errors import RecipeError
from compress.stages import RoundToNearest
from tests.tiny import apply_stage, random_model


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("format_name", ["plain", "compressed-tensors", "gptq"])
def test_integers_times_a_scale_outside_the_stored_dtype_are_refused(tmp_path, format_name, symmetric):
    random_model("llama", tmp_path / "model", attention_bias=False, mlp_bias=False)
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = 1e5
    save_file(tensors, path, {"format": "pt"})
    stage = RoundToNearest(bits=4, group_size=32, symmetric=symmetric)

    done, _ = apply_stage(stage, tmp_path / "model", tmp_path / "float16")
    name = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(RecipeError, match=rf"{name} holds values up to .*e\+05, outside the range of float16"):
        export(done, tmp_path / "exported", format_name, torch.float16, 1 << 30)

    done, _ = apply_stage(stage, tmp_path / "model", tmp_path / "bfloat16", stored=torch.bfloat16)
    export(done, tmp_path / "wide", format_name, torch.bfloat16, 1 << 30)
