"""Quantise with GPTQModel.

    python gptqmodel_worker.py --model DIR --windows FILE --setting NAME --out DIR

| setting   | what                                                                                         |
|-----------|----------------------------------------------------------------------------------------------|
| default   | as it comes: min-max scales, group-aware order (GAR), damping 0.05                           |
| mse       | scales of least weight error, norm 2.4                                                       |
| gptaq     | GPTAQ (asymmetric calibration), alpha 0.25                                                   |
| mse-gptaq | both                                                                                         |
| mse-foem  | mse with FOEM and GPTAQ at the values its documentation recommends: alpha 0.25, beta 0.2     |
| dynamic   | mse, and down projections at 8 bits by a hand-made rule: 4.5 bits in all with --bits 3        |
| batched   | default, with 8 windows a batch instead of 1 and nothing offloaded to disk: for speed        |
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # its own default asks for more threads than a small machine has

import torch
from common import GROUP_SIZE, Job, parse_job, run_job
from gptqmodel import GPTQModel, QuantizeConfig  # type: ignore[import-not-found]
from gptqmodel.quantization.config import FOEMConfig, GPTAQConfig  # type: ignore[import-not-found]
from safetensors import safe_open

SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "mse": {"mse": 2.4},
    "gptaq": {"gptaq": {"alpha": 0.25}},
    "mse-gptaq": {"mse": 2.4, "gptaq": {"alpha": 0.25}},
    "mse-foem": {"mse": 2.4, "foem": {"alpha": 0.25, "beta": 0.2}},
    "dynamic": {"mse": 2.4, "dynamic": {r"+:.*\.down_proj.*": {"bits": 8}}},
    "batched": {"batch_size": 8, "offload_to_disk": False},
}


def load(job: Job) -> Any:
    """Return the model with its quantisation config, in float32 like the other peers."""
    options = {name: value for name, value in SETTINGS[job.setting].items() if name != "batch_size"}
    if "gptaq" in options:
        options["gptaq"] = GPTAQConfig(**options["gptaq"])
    if "foem" in options:
        options["foem"] = FOEMConfig(**options["foem"])
    config = QuantizeConfig(bits=job.bits, group_size=GROUP_SIZE, sym=True, **options)
    return GPTQModel.load(str(job.model), config, dtype=torch.float32)


def quantise(model: Any, job: Job) -> Any:
    """Quantise on exactly the given windows; all have one length, so that batches need no padding."""
    ones = [1] * job.windows.shape[1]
    calibration = [{"input_ids": window, "attention_mask": ones} for window in job.windows.tolist()]
    model.quantize(calibration, batch_size=SETTINGS[job.setting].get("batch_size", 1))
    return model


def export(model: Any, out: Path) -> None:
    """Save in the packed GPTQ format."""
    model.save(str(out))


def read_back(exported: Path, job: Job) -> dict[str, torch.Tensor]:
    """Return the dequantised weights by module name, unpacked from the file."""
    w_hat = {}
    for file in sorted(exported.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            names = [key.removesuffix(".qweight") for key in sorted(tensors.keys()) if key.endswith(".qweight")]
            for name in names:
                parts = ("qweight", "qzeros", "scales", "g_idx")
                qweight, qzeros, scales, g_idx = (tensors.get_tensor(f"{name}.{part}") for part in parts)
                bits = 32 * len(qweight) // len(g_idx)  # a rule may have given a module others than the job's
                w_hat[name] = unpack(qweight, qzeros, scales, g_idx, bits=bits)
    return w_hat


def unpack(
    qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor, g_idx: torch.Tensor, bits: int
) -> torch.Tensor:
    """Return float32 weights `[out, in]` from the GPTQ (version 1) layout.

    qweight int32 `[in x bits / 32, out]` is a stream of codes of successive inputs, lowest bits first; qzeros int32
    `[groups, out x bits / 32]` holds zero points less one; scales `[groups, out]`; g_idx `[in]` names each input's
    group.
    """
    codes = stream(qweight.T, bits).T
    zeros = (stream(qzeros, bits) + 1) % (1 << bits)
    groups = g_idx.long()
    return (scales.float()[groups] * (codes - zeros[groups])).T.contiguous()


def stream(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Return int64 codes `[rows, words x 32 / bits]` from int32 words `[rows, words]`; a code may span two words."""
    single = (words[:, :, None] >> torch.arange(32, dtype=torch.int32)) & 1
    return (single.flatten(1).unflatten(1, (-1, bits)).long() << torch.arange(bits)).sum(-1)


def main() -> None:
    job = parse_job(SETTINGS)
    run_job(job, "gptqmodel", SETTINGS[job.setting], load, quantise, export, read_back)


if __name__ == "__main__":
    main()
