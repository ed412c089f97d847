"""What llama.cpp calls the parts of a model, and in what order it wants rows.

llama.cpp rotates neighbouring rows (2i, 2i + 1) of a Llama's queries and keys where transformers rotates rows i and
i + d/2 of a head, so there the rows of q and k are reordered on the way, scales and codes alike. Qwen's are left alone.
Names come from the gguf package's own tables. Source: llama.cpp's convert_hf_to_gguf.py (`LlamaModel.permute`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from compress.checkpoints.reader import Checkpoint

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""llama.cpp's architecture of each model type that is written here."""
_REORDERED = ("self_attn.q_proj", "self_attn.k_proj")
_PLAIN_ROPE = ("default", "llama3", "linear")


def unsupported(model_type: str, config: Mapping[str, Any] | None = None) -> str | None:
    """Why a model cannot be written, as the end of a sentence; None if it can. `config`: config.json's."""
    if model_type not in ARCHITECTURES:
        return f"{model_type} is not written here; {', '.join(ARCHITECTURES)} are"
    if config is None:
        return None
    rope = rope_of(config)
    kind = str(rope.get("rope_type") or rope.get("type") or "default")
    if kind not in _PLAIN_ROPE:
        return f"rope type {kind!r} is not written here; {', '.join(_PLAIN_ROPE)} are"
    slides = config.get("sliding_window") and config.get("use_sliding_window", model_type == "mistral")
    if slides:
        return f"llama.cpp runs {model_type} without its sliding window of {config['sliding_window']} tokens"
    return None


def rope_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary parameters, wherever this version of transformers puts them."""
    return {
        "rope_theta": config.get("rope_theta"),
        **(config.get("rope_scaling") or {}),
        **(config.get("rope_parameters") or {}),
    }


class Names:
    """Names and row orders of one model."""

    def __init__(self, source: Checkpoint) -> None:
        import gguf

        self.config = source.config
        self.llama = ARCHITECTURES[source.architecture.model_type] == "llama"
        kind = ARCHITECTURES[source.architecture.model_type]
        number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == kind)
        self._table = gguf.get_tensor_name_map(number, source.block_count)

    def of(self, name: str) -> str:
        found = self._table.get_name(name, try_suffixes=(".weight", ".bias"))
        assert found is not None, f"the gguf package does not know {name}"
        return str(found)

    def order(self, name: str, rows: int) -> Tensor:
        """Indices int64 (rows,) of the rows of a tensor as llama.cpp wants them."""
        every = torch.arange(rows)
        if not self.llama or not name.rpartition(".")[0].endswith(_REORDERED):
            return every
        heads = int(self.config["num_attention_heads"])
        if name.rpartition(".")[0].endswith("k_proj"):
            heads = int(self.config.get("num_key_value_heads") or heads)
        return every.view(heads, 2, rows // heads // 2).transpose(1, 2).flatten()

    def ordered(self, name: str, tensor: Tensor) -> Tensor:
        return tensor[self.order(name, tensor.shape[0])] if self.llama else tensor


def metadata(config: Mapping[str, Any]) -> list[tuple[str, Any, str]]:
    """(key, value, type) of a model's sizes."""
    arch = ARCHITECTURES[str(config["model_type"])]
    heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
    head = int(config.get("head_dim") or hidden // heads)
    rope = rope_of(config)
    keys: list[tuple[str, Any, str]] = [
        ("general.architecture", arch, "string"),
        ("general.type", "model", "string"),
        ("general.quantization_version", 2, "uint32"),
        (f"{arch}.block_count", int(config["num_hidden_layers"]), "uint32"),
        (f"{arch}.context_length", int(config["max_position_embeddings"]), "uint32"),
        (f"{arch}.embedding_length", hidden, "uint32"),
        (f"{arch}.feed_forward_length", int(config["intermediate_size"]), "uint32"),
        (f"{arch}.attention.head_count", heads, "uint32"),
        (f"{arch}.attention.head_count_kv", int(config.get("num_key_value_heads") or heads), "uint32"),
        (f"{arch}.attention.key_length", head, "uint32"),
        (f"{arch}.attention.value_length", head, "uint32"),
        (f"{arch}.attention.layer_norm_rms_epsilon", float(config["rms_norm_eps"]), "float32"),
        (f"{arch}.rope.dimension_count", head, "uint32"),
        (f"{arch}.rope.freq_base", float(rope.get("rope_theta") or 10000.0), "float32"),
        (f"{arch}.vocab_size", int(config["vocab_size"]), "uint32"),
    ]
    if str(rope.get("rope_type") or rope.get("type")) == "linear":
        keys.append((f"{arch}.rope.scaling.type", "linear", "string"))
        keys.append((f"{arch}.rope.scaling.factor", float(rope["factor"]), "float32"))
    return keys


def rope_factors(config: Mapping[str, Any]) -> Tensor | None:
    """What llama.cpp divides each rotary frequency by, float32 (head_dim / 2,), for Llama 3's scaling; else None.

    Frequencies whose wavelength is beyond the old context are divided by `factor`, short ones are left alone, and
    between the two it goes smoothly. Source: transformers' `_compute_llama3_parameters`.
    """
    rope = rope_of(config)
    if str(rope.get("rope_type") or rope.get("type")) != "llama3":
        return None
    head = int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])
    base, factor = float(rope["rope_theta"]), float(rope["factor"])
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    old = float(rope["original_max_position_embeddings"])
    factors = []
    for i in range(0, head, 2):
        wavelength = 2 * math.pi * base ** (i / head)
        smooth = (old / wavelength - low) / (high - low)
        if wavelength < old / high:
            factors.append(1.0)
        elif wavelength > old / low:
            factors.append(factor)
        else:
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return torch.tensor(factors, dtype=torch.float32)
