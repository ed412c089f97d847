"""Logits of a GPTQ-layout folder by auto-gptq 0.7.1, with the transformers release it was written for.

python autogptq_worker.py MODEL WINDOWS.safetensors OUT.safetensors         (in an environment with auto-gptq)
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import torch
from auto_gptq import AutoGPTQForCausalLM
from safetensors.torch import load_file, save_file


def with_head(folder: str, place: str) -> str:
    """The folder, or a copy with the head of a tied model written out: where only the embedding is stored, this loader
    leaves both at zero, without an error."""
    tensors = load_file(f"{folder}/model.safetensors")
    if "lm_head.weight" in tensors:
        return folder
    shutil.copytree(folder, place, dirs_exist_ok=True)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    (Path(place) / "model.safetensors").unlink()
    save_file(tensors, f"{place}/model.safetensors", {"format": "pt"})
    return place


@torch.no_grad()
def main(folder: str, windows: str, out: str) -> None:
    ids = load_file(windows)["input_ids"]
    with tempfile.TemporaryDirectory() as place:
        model = AutoGPTQForCausalLM.from_quantized(
            with_head(folder, place), device="cpu", use_safetensors=True, inject_fused_attention=False
        )
    found = torch.stack([model(input_ids=row[None], use_cache=False).logits[0].float() for row in ids])
    save_file({"auto-gptq 0.7.1": found.contiguous()}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
