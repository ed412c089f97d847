"""A single .gguf file -> float32 safetensors, tokenizer and config, through transformers' own GGUF reader.

`dequantize=True` matters: without it transformers 5 may keep the weights packed. Slow (tens of seconds for 135M
parameters), so the caller keeps the result.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch

from compress.errors import EnvironmentLacksError, RecipeError


def convert(path: Path, folder: Path) -> str:
    """Write the model in `path` to `folder`; returns the previous quantisation, e.g. 'Q4_1 x210, Q8_0 x1'."""
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    except ImportError as error:
        raise EnvironmentLacksError(f"reading .gguf needs transformers >= 5.17 with GgufConfig ({error}).") from error
    try:
        tensor_types = _tensor_types(path)
        model = AutoModelForCausalLM.from_pretrained(
            str(path.parent),
            gguf_file=path.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )
    except (ValueError, OSError, KeyError, IndexError) as error:
        raise RecipeError(f"{path}: cannot be read as a GGUF model ({error}).") from error
    if hasattr(model, "hf_quantizer"):
        model.hf_quantizer = None
    model.config.__dict__.pop("quantization_config", None)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name).save_pretrained(folder)
    return tensor_types


def _tensor_types(path: Path) -> str:
    """The matrix types of the file with their counts, floats left out."""
    from gguf import GGUFReader

    counts = Counter(tensor.tensor_type.name for tensor in GGUFReader(str(path)).tensors if len(tensor.shape) > 1)
    return ", ".join(f"{name} x{count}" for name, count in counts.most_common() if name not in ("F32", "F16", "BF16"))
