"""The only file that knows the attribute names of Hugging Face models.

A decoder-only transformer is, to us, an embedding, a list of blocks, a final norm and a head. Inside a block, linears
that read the same input form an `InputGroup`; groups are listed in the order the forward pass reaches them, because a
group can be solved as soon as its input is known. `fused` lists the linears that serving runtimes merge into one
matrix, which must share a scheme there. `couplings` lists where a per-channel factor can move from one tensor to
another without changing the function (used to take a model off a quantisation grid, and by channel-scaling methods).
`mlp_channels` and `kv_heads` say what can be taken out of a block, and what its linears' rows then are.

To add an architecture: one entry in `_ARCHITECTURES`, one line in tests/test_architecture.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from compress.errors import RecipeError, nearest

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class InputGroup:
    """Linears of a block that read the same input, by their names inside the block.

    `residual` names the module (a norm) that reads the residual stream to which the group's output is added as it is;
    None where the output goes elsewhere, or through a norm of its own first.
    """

    name: str
    linears: tuple[str, ...]
    residual: str | None = None


@dataclass(frozen=True)
class Coupling:
    """`writer` produces channels that only `readers` consume; kind says how the channels are laid out.

    norm: `writer` is a norm weight (d,), readers have d input columns.
    rows: `writer` is a linear with n output rows, readers have n input columns.
    value_heads: `writer` has kv_heads x head_dim rows; each serves several query heads in the reader's columns.
    """

    kind: str
    writer: str
    readers: tuple[str, ...]


Rows = Literal["channels", "query_heads", "kv_heads"]
"""What a run of a linear's output rows is: one row each, or head_dim rows each."""


@dataclass(frozen=True)
class Removable:
    """What goes on inside a block between `writers` and `reader`, and can be removed there by the piece.

    `reader` is the linear whose input columns are the pieces, one after another. `writers` are linears with the runs of
    rows they put out: `("qkv_proj", ("query_heads", "kv_heads", "kv_heads"))`.
    """

    reader: str
    writers: tuple[tuple[str, tuple[Rows, ...]], ...]


@dataclass(frozen=True)
class Architecture:
    """Where the parts of one model type live; paths are dotted module names."""

    model_type: str
    prefix: str
    embedding: str
    blocks: str
    final_norm: str
    head: str
    groups: tuple[InputGroup, ...]
    fused: tuple[tuple[str, ...], ...] = ()
    couplings: tuple[Coupling, ...] = ()
    mlp_channels: Removable | None = None
    """The inner channels of the MLP; `width_field` has their number."""
    kv_heads: Removable | None = None
    """KV heads with the query heads that they serve; None where the config cannot say how wide a head is."""
    blocks_field: str = "num_hidden_layers"
    """The config's key for the number of blocks."""
    width_field: str = "intermediate_size"
    """The config's key for the inner width of the MLP."""
    norm_offset: float = 0.0
    """Norms multiply by `norm_offset + weight` (1 for Gemma)."""
    transposed_linears: bool = False
    """Linears are stored as (inputs, outputs): GPT-2's Conv1D."""
    float16_safe: bool = True
    """False where activations are known to leave the float16 range, so 16-bit exports must be bfloat16."""
    extra_modules: tuple[str, ...] = ()
    """Further modules with weights outside the blocks (position embeddings)."""

    @property
    def linears(self) -> tuple[str, ...]:
        """All linears of one block, in the order their inputs become known."""
        return tuple(name for group in self.groups for name in group.linears)

    @property
    def outer_modules(self) -> tuple[str, ...]:
        """Modules with weights outside the blocks."""
        return (self.embedding, *self.extra_modules, self.final_norm, self.head)

    def block_name(self, index: int) -> str:
        return f"{self.blocks}.{index}"

    def block_index(self, tensor_name: str) -> int | None:
        """The block a tensor or module belongs to, or None for the parts outside the blocks."""
        start = self.blocks + "."
        if not tensor_name.startswith(start):
            return None
        return int(tensor_name[len(start) :].split(".", 1)[0])


def _groups(
    qkv: tuple[str, ...], out: str, up: tuple[str, ...], down: str, norms: tuple[str, str] | None
) -> tuple[InputGroup, ...]:
    """`norms`: those before attention and MLP, whose inputs the outputs are added to; None for sandwich norms."""
    attention, mlp = norms or (None, None)
    return (
        InputGroup("attention_input", qkv),
        InputGroup("attention_output", (out,), attention),
        InputGroup("mlp_input", up),
        InputGroup("mlp_output", (down,), mlp),
    )


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
_NORMS = ("input_layernorm", "post_attention_layernorm")

_MLP_CHANNELS = Removable("mlp.down_proj", (("mlp.gate_proj", ("channels",)), ("mlp.up_proj", ("channels",))))
_KV_HEADS = Removable(
    "self_attn.o_proj",
    (
        ("self_attn.q_proj", ("query_heads",)),
        ("self_attn.k_proj", ("kv_heads",)),
        ("self_attn.v_proj", ("kv_heads",)),
    ),
)

_LLAMA = Architecture(
    model_type="llama",
    prefix="model",
    embedding="model.embed_tokens",
    blocks="model.layers",
    final_norm="model.norm",
    head="lm_head",
    groups=_groups(_QKV, "self_attn.o_proj", _GATE_UP, "mlp.down_proj", _NORMS),
    fused=(_QKV, _GATE_UP),
    couplings=(
        Coupling("norm", "input_layernorm", _QKV),
        Coupling("norm", "post_attention_layernorm", _GATE_UP),
        Coupling("rows", "mlp.up_proj", ("mlp.down_proj",)),
        Coupling("value_heads", "self_attn.v_proj", ("self_attn.o_proj",)),
    ),
    mlp_channels=_MLP_CHANNELS,
    kv_heads=_KV_HEADS,
)

_SANDWICHED = _groups(_QKV, "self_attn.o_proj", _GATE_UP, "mlp.down_proj", None)
_GEMMA_SANDWICH = (
    Coupling("norm", "input_layernorm", _QKV),
    Coupling("norm", "pre_feedforward_layernorm", _GATE_UP),
    Coupling("rows", "mlp.up_proj", ("mlp.down_proj",)),
    Coupling("value_heads", "self_attn.v_proj", ("self_attn.o_proj",)),
)

_GEMMA_2 = replace(
    _LLAMA,
    model_type="gemma2",
    norm_offset=1.0,
    float16_safe=False,
    groups=_SANDWICHED,
    couplings=_GEMMA_SANDWICH,
)

_ARCHITECTURES: dict[str, Architecture] = {
    "llama": _LLAMA,
    "mistral": replace(_LLAMA, model_type="mistral"),
    "qwen2": replace(_LLAMA, model_type="qwen2"),
    "qwen3": replace(_LLAMA, model_type="qwen3"),
    "smollm3": replace(_LLAMA, model_type="smollm3"),
    "gemma": replace(_LLAMA, model_type="gemma", norm_offset=1.0, float16_safe=False),
    "gemma2": _GEMMA_2,
    "gemma3_text": replace(_GEMMA_2, model_type="gemma3_text"),
    "phi3": replace(
        _LLAMA,
        model_type="phi3",
        groups=_groups(("self_attn.qkv_proj",), "self_attn.o_proj", ("mlp.gate_up_proj",), "mlp.down_proj", _NORMS),
        fused=(),
        couplings=(
            Coupling("norm", "input_layernorm", ("self_attn.qkv_proj",)),
            Coupling("norm", "post_attention_layernorm", ("mlp.gate_up_proj",)),
        ),
        mlp_channels=Removable("mlp.down_proj", (("mlp.gate_up_proj", ("channels", "channels")),)),
        kv_heads=Removable("self_attn.o_proj", (("self_attn.qkv_proj", ("query_heads", "kv_heads", "kv_heads")),)),
    ),
    "gpt2": Architecture(
        model_type="gpt2",
        prefix="transformer",
        embedding="transformer.wte",
        extra_modules=("transformer.wpe",),
        blocks="transformer.h",
        final_norm="transformer.ln_f",
        head="lm_head",
        groups=_groups(("attn.c_attn",), "attn.c_proj", ("mlp.c_fc",), "mlp.c_proj", ("ln_1", "ln_2")),
        mlp_channels=Removable("mlp.c_proj", (("mlp.c_fc", ("channels",)),)),
        blocks_field="n_layer",
        width_field="n_inner",
        transposed_linears=True,
    ),
}


def known_model_types() -> tuple[str, ...]:
    return tuple(_ARCHITECTURES)


def architecture_of(config: PretrainedConfig | dict[str, Any]) -> Architecture:
    """The architecture of a model, from its config (object or parsed config.json).

    Raises RecipeError for a model type that is not listed, saying what an entry needs.
    """
    model_type = config.get("model_type") if isinstance(config, dict) else config.model_type
    try:
        return _ARCHITECTURES[str(model_type)]
    except KeyError:
        raise RecipeError(
            f"model: architecture {model_type!r} is not known.{nearest(str(model_type), _ARCHITECTURES)} "
            f"Known: {', '.join(_ARCHITECTURES)}. To add it, give compress/architecture.py an entry that names its "
            "embedding, blocks, final norm and head, and the linears of a block grouped by shared input."
        ) from None


@dataclass(frozen=True)
class Dimensions:
    """The sizes that decide memory, read from a config. Counts, except where a unit is named."""

    blocks: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    vocabulary: int
    max_context: int
    sliding_window: int | None
    """Tokens a sliding block keeps, or None if no block slides."""
    sliding_blocks: int


def dimensions_of(config: PretrainedConfig) -> Dimensions:
    """Sizes of a decoder-only model, whatever its config calls them."""
    heads = int(config.num_attention_heads)
    hidden = int(config.hidden_size)
    layer_types = getattr(config, "layer_types", None) or []
    sliding = sum(kind == "sliding_attention" for kind in layer_types)
    blocks = int(config.num_hidden_layers)
    window = getattr(config, "sliding_window", None)
    if window and not layer_types and getattr(config, "use_sliding_window", True):
        sliding = blocks
    return Dimensions(
        blocks=blocks,
        hidden=hidden,
        heads=heads,
        kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        head_dim=int(getattr(config, "head_dim", None) or hidden // heads),
        mlp_width=int(getattr(config, architecture_of(config).width_field, None) or 4 * hidden),
        vocabulary=int(config.vocab_size),
        max_context=int(getattr(config, "max_position_embeddings", 0) or 0),
        sliding_window=int(window) if window and sliding else None,
        sliding_blocks=sliding,
    )


def logit_softcap(config: PretrainedConfig) -> float | None:
    """Gemma 2 squashes logits to (-cap, cap) with tanh; None elsewhere."""
    cap = getattr(config, "final_logit_softcapping", None)
    return float(cap) if cap else None
