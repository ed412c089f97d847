"""What stages that walk calibration text multiply in reaches their sums over it."""

from __future__ import annotations

import pytest
import torch

from compress.calibration import integer_rows
from compress.stages import Gptq, Sensitivity, StructuredPrune
from tests.tiny import apply_stage, random_model, random_windows

STAGES = {
    "gptq": Gptq(bits=4, group_size=32, quality="fast", output_tokens=0),
    "sensitivity": Sensitivity(candidates=(3, 4), group_size=32, tuning_windows=4, alone_tokens=0),
    "structured_prune": StructuredPrune(mlp_channels=32),
}


@pytest.mark.skipif(not integer_rows.exact_here(), reason="no exact products of integers on this CPU")
@pytest.mark.parametrize("kind", STAGES)
@pytest.mark.parametrize("products", ["float32", "bfloat16"])
def test_sums_are_of_integers_where_products_are_in_bfloat16(tmp_path, monkeypatch, kind, products):
    random_model("llama", tmp_path / "model", num_hidden_layers=2)
    seen, original = [], integer_rows.rounded
    monkeypatch.setattr(
        integer_rows, "rounded", lambda *batches: seen.append({each.dtype for each in batches}) or original(*batches)
    )
    stage = STAGES[kind].model_copy(update={"products": products})
    _, outcome = apply_stage(stage, tmp_path / "model", tmp_path / "done", random_windows(count=24))

    assert outcome.facts["products"] == products
    assert outcome.facts["inputs_summed_as"] == ("int8" if products == "bfloat16" else "float32")
    assert bool(seen) == (products == "bfloat16")
    assert all(kinds == {torch.float32} for kinds in seen)
