"""Logits of a GPTQ-layout folder by GPTQModel, once through its own API and once through transformers with optimum.

python gptqmodel_worker.py MODEL WINDOWS.safetensors OUT.safetensors        (in an environment with GPTQModel)
"""

from __future__ import annotations

import os
import sys
from typing import Any

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # or it compiles a kernel for every linear

import torch
from safetensors.torch import load_file, save_file


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """float32 (windows, tokens, vocabulary)."""
    return torch.stack([model(row[None], use_cache=False).logits[0].float() for row in ids])


def main(folder: str, windows: str, out: str) -> None:
    ids = load_file(windows)["input_ids"]
    from gptqmodel import BACKEND, GPTQModel
    from transformers import AutoModelForCausalLM

    own = GPTQModel.load(folder, backend=BACKEND.TORCH, device="cpu", dtype=torch.float16).model.eval()
    found = {"GPTQModel": logits(own, ids)}
    through = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu").eval()
    kinds = {type(module).__name__ for module in through.modules()}
    print("linears:", sorted(kind for kind in kinds if "Linear" in kind), file=sys.stderr)
    found["transformers + optimum + GPTQModel"] = logits(through, ids)
    save_file({name: value.contiguous() for name, value in found.items()}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
