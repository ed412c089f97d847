"""What llama.cpp calls the parts of a model, what it wants in place of some of them, and what it computes otherwise.

- It rotates neighbouring rows (2i, 2i + 1) of a Llama's queries and keys where transformers rotates rows i and i + d/2
  of a head, so there, and in SmolLM3, the rows of q and k are reordered on the way, scales and codes alike.
- It multiplies by norms as they are; Gemma multiplies by 1 + weight, so there 1 is added, in float32.
- Phi-3's q, k, v and gate, up stay fused, in this order.
- It knows Gemma's query scaling by the size of the model, and SmolLM3's layers without rope by their number.

A model that departs from what llama.cpp assumes is refused. Names come from the gguf package's own tables.
Sources: llama.cpp's conversion scripts (rows, norms, keys) and its src/models (what is assumed).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compress.architecture import Dimensions, architecture_of, dimensions_of
from compress.checkpoints.formats import gguf_rope
from compress.errors import RecipeError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_PLAIN = ("default", "linear")
_YARN = (*_PLAIN, "yarn")
_GELU = "gelu_pytorch_tanh"


@dataclass(frozen=True)
class Kind:
    """What llama.cpp's code for a model type takes."""

    name: str
    """Its architecture there."""
    ropes: tuple[str, ...]
    reordered: bool = False
    """Whether it rotates neighbouring rows."""
    activation: str = "silu"
    tied: bool = False
    """Whether it has no head of its own."""
    biases: bool = False
    """Whether it adds biases to what attention and MLP put out, where there are some."""
    slides: bool = False
    """Whether it knows sliding windows."""
    read: bool = True
    """Whether transformers' GGUF reader knows it."""


_LLAMA = Kind("llama", (*_YARN, "llama3", "longrope"), reordered=True, biases=True)
KINDS = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": Kind("qwen2", _YARN),
    "qwen3": Kind("qwen3", _YARN),
    "smollm3": Kind("smollm3", _YARN, reordered=True, read=False),
    "gemma": Kind("gemma", _YARN, activation=_GELU, tied=True, read=False),
    "gemma2": Kind("gemma2", _YARN, activation=_GELU, tied=True, slides=True),
    "gemma3_text": Kind("gemma3", _PLAIN, activation=_GELU, slides=True),
    "phi3": Kind("phi3", ("default", "longrope")),
}
"""Each model type that is written here."""
_REORDERED = ("self_attn.q_proj", "self_attn.k_proj")
_LARGEST = {"gemma2": 46, "gemma3_text": 62}
"""Blocks of the 27B models, whose queries llama.cpp scales by hidden_size / heads instead of head_dim."""
_NOPE_STEP = 4


def completed(config: Mapping[str, Any]) -> PretrainedConfig:
    """config.json's values with transformers' defaults for what it leaves out."""
    from transformers import AutoConfig

    left_out = ("quantization_config", "model_type")
    given = {key: value for key, value in config.items() if key not in left_out}
    return AutoConfig.for_model(str(config["model_type"]), **copy.deepcopy(given))


def unsupported(model_type: str) -> str | None:
    """Why no model of that type can be written, as the end of a sentence; None if some can."""
    return None if model_type in KINDS else f"{model_type} is not written here; {', '.join(KINDS)} are"


def refusals(config: PretrainedConfig) -> list[str]:
    """What llama.cpp would compute otherwise of a model whose type is written here, as ends of sentences."""
    kind, name = KINDS[config.model_type], config.model_type
    found = gguf_rope.refusals(config, kind.ropes)
    sizes = dimensions_of(config)
    if not kind.slides and sizes.sliding_window and sizes.sliding_window < sizes.max_context:
        found.append(f"llama.cpp runs {name} without its sliding window of {sizes.sliding_window} tokens")
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation not in (kind.activation, "swish" if kind.activation == "silu" else None):
        found.append(f"llama.cpp runs {name} with {kind.activation}, and its activation is {activation}")
    if kind.tied and not config.tie_word_embeddings:
        found.append(f"llama.cpp takes {name}'s embedding for its head, and it has another")
    if not kind.biases and (getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False)):
        found.append(f"llama.cpp has no place for biases of {name}'s attention and MLP")
    if getattr(config, "use_bidirectional_attention", False):
        found.append(f"llama.cpp runs {name} with causal attention, and its config wants it in both directions")
    return found + _refusals_of_one(config, sizes)


def _refusals_of_one(config: PretrainedConfig, sizes: Dimensions) -> list[str]:
    """What is particular to one model type."""
    name, found = config.model_type, []
    if name == "smollm3":
        expected = [int((index + 1) % _NOPE_STEP != 0) for index in range(config.num_hidden_layers)]
        if [int(bool(each)) for each in config.no_rope_layers[: config.num_hidden_layers]] != expected:
            found.append("llama.cpp runs smollm3 without rope in every fourth layer, and here it is in others")
    if name in _LARGEST:
        largest = config.num_hidden_layers == _LARGEST[name]
        scaled = config.hidden_size // config.num_attention_heads if largest else config.head_dim
        if config.query_pre_attn_scalar != scaled:
            found.append(
                f"llama.cpp divides queries of a {name} of {config.num_hidden_layers} blocks by the root of {scaled}, "
                f"and query_pre_attn_scalar is {config.query_pre_attn_scalar}"
            )
    if name == "gemma2" and not (config.attn_logit_softcapping and config.final_logit_softcapping):
        found.append("llama.cpp caps gemma2's attention and logits, and here they are not")
    if name == "gemma2" and not sizes.sliding_window:
        found.append("llama.cpp does not run a gemma2 of which no layer slides")
    if name == "phi3" and gguf_rope.head_dim_of(config) * config.num_attention_heads != config.hidden_size:
        found.append("llama.cpp expects heads of phi3 to make up hidden_size")
    return found


class Names:
    """Names and values of one model's tensors."""

    def __init__(self, config: PretrainedConfig) -> None:
        import gguf

        self.config, self.kind = config, KINDS[config.model_type]
        self.norm_offset = architecture_of(config).norm_offset
        number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == self.kind.name)
        self._table = gguf.get_tensor_name_map(number, config.num_hidden_layers)

    def of(self, name: str) -> str:
        found = self._table.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise RecipeError(
                f"export.format: gguf has no name for the tensor {name}; take it out of the model's files"
            )
        return str(found)

    def order(self, name: str, rows: int) -> Tensor:
        """Indices int64 (rows,) of the rows of a tensor as llama.cpp wants them."""
        every = torch.arange(rows)
        if not self.kind.reordered or not name.rpartition(".")[0].endswith(_REORDERED):
            return every
        heads = int(self.config.num_attention_heads)
        if name.rpartition(".")[0].endswith("k_proj"):
            heads = int(self.config.num_key_value_heads)
        return every.view(heads, 2, rows // heads // 2).transpose(1, 2).flatten()

    def written(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor (rows, ...) as llama.cpp wants it: rows in its order; Gemma's norms (width,) plus 1, in float32."""
        if self.norm_offset and name.endswith("norm.weight"):
            return tensor.float() + self.norm_offset
        return tensor[self.order(name, tensor.shape[0])] if self.kind.reordered else tensor

    def read(self, name: str, tensor: Tensor) -> Tensor:
        """The inverse of `written`, of float32."""
        if self.norm_offset and name.endswith("norm.weight"):
            return tensor - self.norm_offset
        return tensor[self.order(name, tensor.shape[0]).argsort()] if self.kind.reordered else tensor


def metadata(config: PretrainedConfig) -> list[tuple[str, Any, str]]:
    """(key, value, type) of a model's sizes."""
    kind, head = KINDS[config.model_type], gguf_rope.head_dim_of(config)
    arch, heads = kind.name, int(config.num_attention_heads)
    keys: list[tuple[str, Any, str]] = [
        ("general.architecture", arch, "string"),
        ("general.type", "model", "string"),
        ("general.quantization_version", 2, "uint32"),
        (f"{arch}.block_count", int(config.num_hidden_layers), "uint32"),
        (f"{arch}.context_length", int(config.max_position_embeddings), "uint32"),
        (f"{arch}.embedding_length", int(config.hidden_size), "uint32"),
        (f"{arch}.feed_forward_length", int(config.intermediate_size), "uint32"),
        (f"{arch}.attention.head_count", heads, "uint32"),
        (f"{arch}.attention.head_count_kv", int(config.num_key_value_heads or heads), "uint32"),
        (f"{arch}.attention.key_length", head, "uint32"),
        (f"{arch}.attention.value_length", head, "uint32"),
        (f"{arch}.attention.layer_norm_rms_epsilon", float(config.rms_norm_eps), "float32"),
        (f"{arch}.vocab_size", int(config.vocab_size), "uint32"),
        *gguf_rope.keys_of(config, arch),
    ]
    if kind.slides:
        slide = [each == gguf_rope.SLIDING for each in config.layer_types]
        window = int(config.sliding_window or 0) if any(slide) else 0
        keys.append((f"{arch}.attention.sliding_window", window, "uint32"))
        keys.append((f"{arch}.attention.sliding_window_pattern", slide, "array"))
    elif arch == "phi3":
        # Older versions of llama.cpp assume one, or stop, where none is named.
        keys.append(("phi3.attention.sliding_window", 0, "uint32"))
    if arch == "gemma2":
        keys.append(("gemma2.attn_logit_softcapping", float(config.attn_logit_softcapping), "float32"))
    if getattr(config, "final_logit_softcapping", None):
        keys.append((f"{arch}.final_logit_softcapping", float(config.final_logit_softcapping), "float32"))
    return keys
