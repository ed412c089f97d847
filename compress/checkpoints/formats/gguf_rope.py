"""Rotary embeddings as llama.cpp is told of them: keys of the file, and tensors that divide the frequencies.

    default     the base alone
    linear      every frequency is divided by a factor
    yarn        some are, by ramps from beta_fast to beta_slow; cosines are multiplied by an attention factor
    llama3      divided by a tensor, computed here
    longrope    by one of two tensors of the config, up to the old context or beyond it; an attention factor as yarn's

llama.cpp multiplies YaRN's cosines by 0.1 ln(factor) + 1 of its own accord; what is written is the quotient to that. It
takes longrope's long factors where its context is larger than the old one, transformers where the text is: they differ
on a text that would fit the old context and is read in a larger one.
Sources: transformers' modeling_rope_utils.py; llama-context.cpp, llama-model.cpp and ops.cpp of llama.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FULL, SLIDING = "full_attention", "sliding_attention"
YARN_BETAS = (32.0, 1.0)
"""llama.cpp's beta_fast and beta_slow. It reads others for a few architectures, none of them written here."""


def ropes_of(config: PretrainedConfig) -> tuple[Mapping[str, Any], Mapping[str, Any] | None]:
    """Rotary parameters of full attention, and of sliding attention where it has its own."""
    rope = config.rope_parameters
    return (rope[FULL], rope[SLIDING]) if FULL in rope else (rope, None)


def head_dim_of(config: PretrainedConfig) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def rotated(config: PretrainedConfig) -> int:
    """Columns of a head that are rotated."""
    full, _ = ropes_of(config)
    return int(head_dim_of(config) * float(full.get("partial_rotary_factor") or 1.0))


def refusals(config: PretrainedConfig, known: tuple[str, ...]) -> list[str]:
    """What llama.cpp would compute otherwise, as ends of sentences. `known`: rope types that it has here."""
    full, sliding = ropes_of(config)
    kind, model_type = full["rope_type"], config.model_type
    if kind not in known:
        return [f"rope type {kind!r} is not written here for {model_type}; {', '.join(known)} are"]
    found = []
    if sliding is not None and sliding["rope_type"] != "default":
        found.append(
            f"llama.cpp does not scale the rope of sliding layers, which has type {sliding['rope_type']!r} here"
        )
    betas = tuple(float(full.get(key) or own) for key, own in zip(("beta_fast", "beta_slow"), YARN_BETAS, strict=True))
    if kind == "yarn" and (betas != YARN_BETAS or full.get("truncate") is False):
        found.append("llama.cpp runs YaRN with beta_fast 32, beta_slow 1 and bounds that are rounded, and nothing else")
    return found


def keys_of(config: PretrainedConfig, arch: str) -> list[tuple[str, Any, str]]:
    """(key, value, type) for llama.cpp's architecture `arch`."""
    full, sliding = ropes_of(config)
    keys: list[tuple[str, Any, str]] = [
        (f"{arch}.rope.dimension_count", rotated(config), "uint32"),
        (f"{arch}.rope.freq_base", float(full["rope_theta"]), "float32"),
    ]
    if sliding is not None:
        keys.append((f"{arch}.rope.freq_base_swa", float(sliding["rope_theta"]), "float32"))
    kind, scaling = full["rope_type"], f"{arch}.rope.scaling"
    if kind in ("linear", "yarn", "longrope"):
        keys.append((f"{scaling}.type", kind, "string"))
    if kind in ("linear", "yarn"):
        keys.append((f"{scaling}.factor", _factor(config, full), "float32"))
    if kind in ("yarn", "longrope"):
        keys.append((f"{scaling}.original_context_length", int(full["original_max_position_embeddings"]), "uint32"))
        keys.append((f"{scaling}.attn_factor", _attention_factor(config, full), "float32"))
    return keys


def tensors_of(config: PretrainedConfig) -> dict[str, Tensor]:
    """What frequencies are divided by: float32 (rotated columns / 2,) by the tensor's name; empty where nothing is."""
    full, _ = ropes_of(config)
    if full["rope_type"] == "llama3":
        return {"rope_freqs.weight": _llama3(full, rotated(config))}
    if full["rope_type"] == "longrope":
        lengths = ("long", "short")
        return {f"rope_factors_{each}.weight": torch.tensor(full[f"{each}_factor"]).float() for each in lengths}
    return {}


def _factor(config: PretrainedConfig, rope: Mapping[str, Any]) -> float:
    """How many times the old context the model reads."""
    old = rope.get("original_max_position_embeddings")
    return float(rope.get("factor") or config.max_position_embeddings / old)


def _attention_factor(config: PretrainedConfig, rope: Mapping[str, Any]) -> float:
    """What cosines and sines are multiplied by; of YaRN's, what llama.cpp has not multiplied by already."""
    factor, given = _factor(config, rope), rope.get("attention_factor")
    if rope["rope_type"] == "longrope":
        old = float(rope["original_max_position_embeddings"])
        return float(given or math.sqrt(1 + math.log(max(factor, 1.0)) / math.log(old)))
    own, of_keys = _yarn(factor, 1.0), (rope.get("mscale"), rope.get("mscale_all_dim"))
    if given is None:
        given = _yarn(factor, of_keys[0]) / _yarn(factor, of_keys[1]) if all(of_keys) else own
    return float(given) / own


def _yarn(factor: float, mscale: Any) -> float:
    return 0.1 * float(mscale) * math.log(max(factor, 1.0)) + 1


def _llama3(rope: Mapping[str, Any], columns: int) -> Tensor:
    """Llama 3's divisors.

    Frequencies whose wavelength is beyond the old context are divided by `factor`, short ones are left alone, and
    between the two it goes smoothly. Source: transformers' `_compute_llama3_parameters`.
    """
    base, factor = float(rope["rope_theta"]), float(rope["factor"])
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    old = float(rope["original_max_position_embeddings"])
    factors = []
    for i in range(0, columns, 2):
        wavelength = 2 * math.pi * base ** (i / columns)
        smooth = (old / wavelength - low) / (high - low)
        if wavelength < old / high:
            factors.append(1.0)
        elif wavelength > old / low:
            factors.append(factor)
        else:
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return torch.tensor(factors, dtype=torch.float32)
