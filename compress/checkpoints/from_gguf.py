"""A single .gguf file -> float32 safetensors, tokenizer and config, through transformers' own GGUF reader.

`dequantize=True` matters: without it transformers 5 may keep the weights packed. Slow (tens of seconds for 135M
parameters), so the caller keeps the result. Of our own files, those of types that transformers' reader does not know
(`Kind.read`) are read here, by undoing what the format did.
"""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from compress.architecture import architecture_of
from compress.checkpoints.folder import companion_files
from compress.checkpoints.formats.gguf_names import KINDS, Names
from compress.errors import EnvironmentLacksError, RecipeError


def convert(path: Path, folder: Path, beside: Path | None = None) -> str:
    """Write the model in `path` to `folder`; returns the previous quantisation, e.g. 'Q4_1 x210, Q8_0 x1'.

    `beside`: a folder whose config and tokenizer are the model's, and say more than the .gguf can; else what the file
    itself says of both.
    """
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    except ImportError as error:
        raise EnvironmentLacksError(f"reading .gguf needs transformers >= 5.17 with GgufConfig ({error}).") from error
    try:
        tensor_types = _tensor_types(path)
        model = _read_here(path, beside) if beside else None
        if model is None:
            model = AutoModelForCausalLM.from_pretrained(
                str(path.parent),
                gguf_file=path.name,
                dtype=torch.float32,
                quantization_config=GgufConfig(dequantize=True),
                **_own_config(beside),
            )
    except (ValueError, OSError, KeyError, IndexError) as error:
        raise RecipeError(f"{path}: cannot be read as a GGUF model ({error}).") from error
    if hasattr(model, "hf_quantizer"):
        model.hf_quantizer = None
    model.config.__dict__.pop("quantization_config", None)
    model.save_pretrained(folder)
    if beside is None:
        AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name).save_pretrained(folder)
    else:
        for companion in companion_files(beside):
            shutil.copyfile(companion, folder / companion.name)
    return tensor_types


def _read_here(path: Path, beside: Path) -> Any:
    """The model in float32, its computed buffers left out; None of a type that transformers reads itself."""
    from gguf import GGUFReader, dequantize
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(beside)
    kind = KINDS.get(config.model_type)
    if kind is None or kind.read:
        return None
    names, stored = Names(config), {tensor.name: tensor for tensor in GGUFReader(str(path)).tensors}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    tied = f"{architecture_of(config).head}.weight" if config.tie_word_embeddings else None
    values = {}
    for name in model.state_dict():
        if name != tied:
            tensor = stored[names.of(name)]
            dense = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
            values[name] = names.read(name, dense).contiguous()
    model.load_state_dict(values, strict=False, assign=True)
    model.tie_weights()
    return model


def _own_config(beside: Path | None) -> dict[str, Any]:
    """The config that the reader takes in place of the file's, where it knows that model type by that name."""
    if beside is None:
        return {}
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(beside)
    return {} if config.model_type == "mistral" else {"config": config}


def _tensor_types(path: Path) -> str:
    """The matrix types of the file with their counts, floats left out."""
    from gguf import GGUFReader

    counts = Counter(tensor.tensor_type.name for tensor in GGUFReader(str(path)).tensors if len(tensor.shape) > 1)
    return ", ".join(f"{name} x{count}" for name, count in counts.most_common() if name not in ("F32", "F16", "BF16"))
