"""The transformers model without its weights, into which one part at a time is loaded.

Only transformers knows how a Gemma block masks or a Phi block rotates, so its own code runs: the model is built on
the meta device, the blocks are swapped for recorders to learn what arguments each block receives, and a block gets
weights for as long as it is needed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress.architecture import Architecture, architecture_of, logit_softcap
from compress.checkpoints import attention
from compress.checkpoints.reader import Checkpoint
from compress.errors import CompressError, UnhealthySourceError
from compress.quantization.inputs import IntegerLinear, run_as_before, run_as_loaded, run_on_integers
from compress.quantization.kv_cache import RoundedCache, SeenCache


@dataclass(frozen=True)
class Batch:
    """Token ids (windows, tokens) int64, and the attention mask of the same shape, or None if nothing is padded."""

    ids: Tensor
    mask: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Tokens that are not padding."""
        return int(self.ids.numel() if self.mask is None else self.mask.sum())


@dataclass(frozen=True)
class Call:
    """The arguments, other than the hidden states, that the model passes to one block."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Recorder(nn.Module):
    def __init__(self, calls: list[Call]) -> None:
        super().__init__()
        self.calls = calls

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.calls.append(Call(args, kwargs))
        return hidden_states


@contextmanager
def _told_as_a_config_s_mistake() -> Iterator[None]:
    """What transformers raises of a config with values that no model has, as a sentence."""
    try:
        yield
    except (CompressError, MemoryError, ImportError):
        raise
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else "no reason given"
        raise UnhealthySourceError(
            f"config.json: transformers makes no model of it ({type(error).__name__}: {first}); fetch it again"
        ) from error


class Skeleton:
    """A causal language model on the meta device. `device` and `dtype` are where and in what parts compute."""

    def __init__(self, config: dict[str, Any], device: torch.device, dtype: torch.dtype) -> None:
        from accelerate import init_empty_weights
        from transformers import AutoConfig, AutoModelForCausalLM

        self.config_json = config
        """As in config.json; `config` is what transformers makes of it."""
        clean = {key: value for key, value in config.items() if key not in ("quantization_config", "model_type")}
        with _told_as_a_config_s_mistake():
            self.config = AutoConfig.for_model(config["model_type"], **copy.deepcopy(clean))
        self.config.use_cache = False
        self.architecture: Architecture = architecture_of(self.config)
        self.device, self.dtype = device, dtype
        self.cache: RoundedCache | SeenCache | None = None
        """What the block that is loaded is given as its KV cache."""
        self.as_loaded = False
        """Whether linears with integer inputs compute as transformers does, and not as the kernels that serve them."""
        with _told_as_a_config_s_mistake(), init_empty_weights(include_buffers=False):
            # transformers chooses the attention: fused where it can, eager for Gemma 2, whose soft caps no kernel has.
            self.model: nn.Module = AutoModelForCausalLM.from_config(self.config)
        if self.config._attn_implementation == "sdpa" and self.model._supports_attention_backend:
            # The same, but where linears multiply in bfloat16 on a CPU.
            self.model.set_attn_implementation(attention.registered())
        self.model.eval()
        self._body: nn.Module = self.model.get_submodule(self.architecture.prefix)
        blocks = self.model.get_submodule(self.architecture.blocks)
        assert isinstance(blocks, nn.ModuleList)
        if not len(blocks):
            raise UnhealthySourceError("config.json: a model with no decoder blocks; fetch the config again")
        self._blocks = blocks
        self._move_outer_buffers()
        self._calls: dict[tuple[int, int], list[Call]] = {}

    def _move_outer_buffers(self) -> None:
        """Rotary frequencies and the like: computed from the config, needed from the start."""
        blocks = set(self._blocks.modules())
        for module in self.model.modules():
            if module not in blocks:
                for name, buffer in module.named_buffers(recurse=False):
                    module._buffers[name] = buffer.to(self.device)

    @property
    def block_count(self) -> int:
        return len(self._blocks)

    def block(self, index: int) -> nn.Module:
        return self._blocks[index]

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """(rows, columns) = (outputs, inputs) of every linear of every block, by full name."""
        shapes = {}
        for index in range(self.block_count):
            for name in self.architecture.linears:
                first, second = self._blocks[index].get_submodule(name).get_parameter("weight").shape
                shape = (int(second), int(first)) if self.architecture.transposed_linears else (int(first), int(second))
                shapes[f"{self.architecture.block_name(index)}.{name}"] = shape
        return shapes

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every stored parameter (a tied head is not stored)."""
        tied = f"{self.architecture.head}.weight" if self.config.tie_word_embeddings else None
        return {name: tuple(value.shape) for name, value in self.model.named_parameters() if name != tied}

    @contextmanager
    def loaded(self, checkpoint: Checkpoint, path: str, state: dict[str, Tensor] | None = None) -> Iterator[nn.Module]:
        """The module at `path` with its weights, on the device, in the compute dtype; back to meta afterwards.

        `state`: the checkpoint's tensors below `path`, where they have been read already.
        """
        module = self.model.get_submodule(path)
        load_module(module, checkpoint.dense_state(path) if state is None else state, self.device, self.dtype)
        # The module has what it needs; the rest, and weights that are replaced meanwhile, are not to be kept alive.
        del state
        self._run_on_integers(module, checkpoint, path)
        self.cache = self._rounded_cache(checkpoint, path)
        try:
            yield module
        finally:
            self.cache = None
            run_as_before(module)
            unload_module(module)

    def _rounded_cache(self, checkpoint: Checkpoint, path: str) -> RoundedCache | None:
        """The cache of a block whose keys and values a runtime will keep in fp8."""
        names = [name for name in checkpoint.kv_scales if name.startswith(path + ".")]
        if not names:
            return None
        key, value = (checkpoint.read(name).to(self.device) for name in sorted(names))
        return RoundedCache(key, value)

    def _run_on_integers(self, module: nn.Module, checkpoint: Checkpoint, path: str) -> None:
        """Linears whose inputs are integers compute as their runtime does."""
        for name, scheme in checkpoint.schemes.items():
            if not scheme.inputs or not name.startswith(path + "."):
                continue
            linear = module.get_submodule(name.removeprefix(path + "."))
            if self.as_loaded and not scheme.outliers:
                run_as_loaded(linear)
            else:
                codes, grid = checkpoint.codes(name)
                forward = IntegerLinear(codes.to(self.device), grid.scale.to(self.device), scheme.outliers)
                run_on_integers(linear, forward)

    @torch.no_grad()
    def embed(self, checkpoint: Checkpoint, batches: list[Batch]) -> list[Tensor]:
        """Hidden states entering the first block, (windows, tokens, hidden) per batch; also learns the calls."""
        arch = self.architecture
        outer = [self.model.get_submodule(path) for path in (arch.embedding, *arch.extra_modules)]
        for path, module in zip((arch.embedding, *arch.extra_modules), outer, strict=True):
            load_module(module, checkpoint.dense_state(path), self.device, self.dtype)
        norm = self.model.get_submodule(arch.final_norm)
        parent, leaf = arch.final_norm.rsplit(".", 1)
        setattr(self.model.get_submodule(parent), leaf, nn.Identity())
        states = []
        try:
            for batch in batches:
                hidden, calls = self._record(batch)
                states.append(hidden)
                if batch.mask is None:
                    self._calls[(batch.ids.shape[0], batch.ids.shape[1])] = calls
        finally:
            setattr(self.model.get_submodule(parent), leaf, norm)
            for module in outer:
                unload_module(module)
        return states

    def _record(self, batch: Batch) -> tuple[Tensor, list[Call]]:
        calls: list[Call] = []
        parent, leaf = self.architecture.blocks.rsplit(".", 1)
        owner = self.model.get_submodule(parent)
        setattr(owner, leaf, nn.ModuleList(_Recorder(calls) for _ in range(self.block_count)))
        try:
            mask = None if batch.mask is None else batch.mask.to(self.device)
            output = self._body(input_ids=batch.ids.to(self.device), attention_mask=mask, use_cache=False)
        finally:
            setattr(owner, leaf, self._blocks)
        return output.last_hidden_state, calls

    def call(self, batch: Batch, hidden: Tensor, index: int) -> Call:
        """The arguments block `index` receives for `batch`. Batches without padding share them by shape."""
        return self.calls(batch, hidden)[index]

    @torch.no_grad()
    def calls(self, batch: Batch, hidden: Tensor) -> list[Call]:
        """The arguments of every block for `batch`, whose hidden states (windows, tokens, hidden) give the dtype."""
        known = self._calls.get((batch.ids.shape[0], batch.ids.shape[1])) if batch.mask is None else None
        return self._record_from_hidden(batch, hidden) if known is None else known

    def _record_from_hidden(self, batch: Batch, hidden: Tensor) -> list[Call]:
        """Masks of a padded batch are rebuilt when needed rather than kept: they grow with tokens squared."""
        calls: list[Call] = []
        arch = self.architecture
        parent, leaf = arch.blocks.rsplit(".", 1)
        norm_parent, norm_leaf = arch.final_norm.rsplit(".", 1)
        owner, norm_owner = self.model.get_submodule(parent), self.model.get_submodule(norm_parent)
        norm = self.model.get_submodule(arch.final_norm)
        extra = {path: self.model.get_submodule(path) for path in arch.extra_modules}
        setattr(owner, leaf, nn.ModuleList(_Recorder(calls) for _ in range(self.block_count)))
        setattr(norm_owner, norm_leaf, nn.Identity())
        for path in extra:
            self.model.set_submodule(path, _Zeros(hidden))
        try:
            mask = None if batch.mask is None else batch.mask.to(self.device)
            self._body(inputs_embeds=hidden, attention_mask=mask, use_cache=False)
        finally:
            setattr(owner, leaf, self._blocks)
            setattr(norm_owner, norm_leaf, norm)
            for path, module in extra.items():
                self.model.set_submodule(path, module)
        return calls

    @contextmanager
    def head(self, checkpoint: Checkpoint, products: torch.dtype | None = None) -> Iterator[Head]:
        """Final norm and head with weights, which multiply in `products`, or in what the skeleton computes in."""
        arch = self.architecture
        norm = self.model.get_submodule(arch.final_norm)
        load_module(norm, checkpoint.dense_state(arch.final_norm), self.device, self.dtype)
        source = arch.embedding if checkpoint.tied_head else arch.head
        dtype = products or self.dtype
        weight = checkpoint.dense(source).to(self.device, dtype)
        bias_name = f"{arch.head}.bias"
        bias = checkpoint.read(bias_name).to(self.device, dtype) if checkpoint.has(bias_name) else None
        try:
            yield Head(norm, weight, bias, logit_softcap(self.config))
        finally:
            unload_module(norm)


@dataclass(frozen=True)
class Head:
    """Final norm, then logits. weight (vocabulary, hidden)."""

    norm: nn.Module
    weight: Tensor
    bias: Tensor | None
    softcap: float | None

    @torch.no_grad()
    def logits(self, normed: Tensor) -> Tensor:
        """Logits float32 (tokens, vocabulary) of final hidden states (tokens, hidden), after the norm."""
        return self.differentiable_logits(normed)

    def differentiable_logits(self, normed: Tensor) -> Tensor:
        """The same, with gradients where they are on."""
        return self.capped(torch.nn.functional.linear(normed.to(self.weight), self.weight, self.bias).float())

    @torch.no_grad()
    def logits_of(self, tokens: Tensor, normed: Tensor) -> Tensor:
        """Logits float32 (positions, some, models) of some tokens a position (positions, some), for final hidden states
        of several models (positions, hidden, models), after the norm."""
        logits = torch.bmm(self.weight[tokens].float(), normed.float())
        if self.bias is not None:
            logits += self.bias[tokens].float().unsqueeze(-1)
        return self.capped(logits)

    def capped(self, logits: Tensor) -> Tensor:
        """Logits after the soft cap, where the model has one."""
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap


class _Zeros(nn.Module):
    """Stands in for a position embedding when only the arguments of the blocks are wanted."""

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.like = like

    def forward(self, positions: Tensor) -> Tensor:
        return torch.zeros(*positions.shape, self.like.shape[-1], dtype=self.like.dtype, device=self.like.device)


def load_module(module: nn.Module, state: dict[str, Tensor], device: torch.device, dtype: torch.dtype) -> None:
    """Give a meta module its tensors. Raises KeyError-like RuntimeError if one is missing; extra ones are ignored."""
    wanted = {name for name, _ in module.named_parameters()}
    ready = {
        name: tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in state.items()
        if name in wanted
    }
    missing = sorted(wanted - set(ready))
    if missing:
        raise RuntimeError(f"tensors missing from the checkpoint: {', '.join(missing[:5])}")
    module.load_state_dict(ready, strict=False, assign=True)
    module.requires_grad_(False)
    for child in module.modules():
        for name, buffer in child.named_buffers(recurse=False):
            child._buffers[name] = buffer.to(device)


def unload_module(module: nn.Module) -> None:
    """Drop the weights: parameters go back to the meta device."""
    for child in module.modules():
        for name, parameter in child._parameters.items():
            if parameter is not None:
                child._parameters[name] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
