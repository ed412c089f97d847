"""Quantise with llm-compressor: its GPTQ with three scale observers, and plain rounding as the baseline.

    python llmcompressor_worker.py --model DIR --windows FILE --setting NAME --out DIR

| setting | what                                                                                                      |
|---------|-----------------------------------------------------------------------------------------------------------|
| rtn     | QuantizationModifier: rounding, min-max scales, no calibration data                                       |
| rtn-mse | the same with scales of least weight error                                                                |
| default | GPTQModifier as it comes: min-max scales, damping 0.01, static activation order                           |
| mse     | its scales from `memoryless_mse`                                                                          |
| imatrix | its scales from `imatrix_mse`: weight error weighted by E[x^2] of the inputs                              |
| batched | default, with 8 windows a batch instead of 1: for speed                                                   |
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from common import GROUP_SIZE, Job, parse_job, run_job
from llmcompressor import oneshot  # type: ignore[import-not-found]
from llmcompressor.modifiers.gptq import GPTQModifier  # type: ignore[import-not-found]
from llmcompressor.modifiers.quantization import QuantizationModifier  # type: ignore[import-not-found]
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig

SETTINGS: dict[str, dict[str, Any]] = {
    "rtn": {"method": "rtn"},
    "rtn-mse": {"method": "rtn", "observer": "memoryless_mse"},
    "default": {"method": "gptq"},
    "mse": {"method": "gptq", "observer": "memoryless_mse"},
    "imatrix": {"method": "gptq", "observer": "imatrix_mse"},
    "batched": {"method": "gptq", "batch_size": 8},
}


def recipe(setting: str, bits: int) -> Any:
    """Return the modifier for weights alone, symmetric, grouped; lm_head and embeddings stay as they are."""
    options = SETTINGS[setting]
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP_SIZE}
    if "observer" in options:
        weights["observer"] = options["observer"]
    modifier = GPTQModifier if options["method"] == "gptq" else QuantizationModifier
    return modifier(config_groups={"group_0": {"targets": ["Linear"], "weights": weights}}, ignore=["lm_head"])


def load(job: Job) -> Any:
    """Return the model in float32: the CPU has no fast half precision, and no peer should lose to a cast."""
    return AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32)


def quantise(model: Any, job: Job) -> Any:
    """Run one-shot compression on exactly the given windows; rounding needs none."""
    options = SETTINGS[job.setting]
    windows: Any = job.windows  # torch's stubs leave split and the loader's lists untyped
    chunks = windows.split(options.get("batch_size", 1))
    batches: Any = [{"input_ids": chunk, "attention_mask": torch.ones_like(chunk)} for chunk in chunks]
    data: Any = None if options["method"] == "rtn" else DataLoader(batches, batch_size=None, shuffle=False)
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    return oneshot(model=model, dataset=data, recipe=recipe(job.setting, job.bits), processor=tokenizer)


def export(model: Any, out: Path) -> None:
    """Save in the packed compressed-tensors format."""
    model.save_pretrained(out, save_compressed=True)


def read_back(exported: Path, job: Job) -> dict[str, torch.Tensor]:
    """Return the dequantised weights by module name, decompressed by compressed-tensors."""
    config = CompressedTensorsConfig(run_compressed=False)
    model = AutoModelForCausalLM.from_pretrained(exported, quantization_config=config, dtype=torch.float32)
    return {
        name: module.weight.detach()
        for name, module in model.named_modules()
        if hasattr(module, "quantization_scheme") and isinstance(module, torch.nn.Linear)
    }


def main() -> None:
    job = parse_job(SETTINGS)
    run_job(job, "llmcompressor", SETTINGS[job.setting], load, quantise, export, read_back)


if __name__ == "__main__":
    main()
