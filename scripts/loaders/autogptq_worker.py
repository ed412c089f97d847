"""Logits of a GPTQ-layout folder by auto-gptq 0.7.1, with the transformers release it was written for.

python autogptq_worker.py MODEL WINDOWS.safetensors OUT.safetensors         (in an environment with auto-gptq)
"""

from __future__ import annotations

import sys

import torch
from auto_gptq import AutoGPTQForCausalLM
from safetensors.torch import load_file, save_file


@torch.no_grad()
def main(folder: str, windows: str, out: str) -> None:
    ids = load_file(windows)["input_ids"]
    model = AutoGPTQForCausalLM.from_quantized(folder, device="cpu", use_safetensors=True, inject_fused_attention=False)
    if model.config.tie_word_embeddings:
        # It ties the head before it loads, and loading replaces the embedding alone: the head is left as it was made.
        model.model.tie_weights()
    found = torch.stack([model(input_ids=row[None], use_cache=False).logits[0].float() for row in ids])
    save_file({"auto-gptq 0.7.1": found.contiguous()}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
