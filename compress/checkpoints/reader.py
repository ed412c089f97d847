"""Reading a model folder, whatever its layout, one block at a time.

    plain               Hugging Face safetensors, one file or shards with an index
    working             what stages write (see `working`): <module>.codes / .scale / .zero_point beside plain tensors
    packed              what `formats` can read back: compressed-tensors, GPTQ's layout, bitsandbytes

All answer the same questions: which tensors, which module has which scheme, the dense tensors of a block.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from threading import Event
from typing import Any, Literal, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from compress.architecture import Architecture, architecture_of
from compress.checkpoints.folder import DamagedCheckpointError, companion_files, read_config, says_tied, weight_files
from compress.files import digest_of_json, digests_of
from compress.quantization.grid import Grid, Nested, dequantize
from compress.quantization.scheme import Scheme
from compress.quantization.super_blocks import SuperBlocks

SCHEMES_KEY = "compress.schemes"
PLAN_FILE = "precision.json"
KV_SCALES = ("k_scale", "v_scale")
"""Scales of a KV cache that is kept in fp8, tensors of a block's attention."""
NESTED = ("codes", "absmax", "table", "offset")
"""Parts of nested scales, in the order of `grid.Nested`."""
NO_PARAMETERS = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")
"""Ends of names of buffers in old files (Llama's rotary frequencies, GPT-2's causal mask): models compute them, and
loaders skip them or fail."""
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Layout(Protocol):
    """How a public format keeps quantised linears; `formats.layout_of` finds it."""

    def schemes_in(self, checkpoint: Checkpoint) -> dict[str, Scheme]:
        """Scheme of each linear that the format packs, by module name."""

    def codes_of(self, checkpoint: Checkpoint, module: str, scheme: Scheme) -> tuple[Tensor, Grid]:
        """Codes int8 (rows, columns) and grid of one of them."""


class Checkpoint:
    """A model folder opened for reading. Cheap: headers only; tensors are read when asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config: dict[str, Any] = read_config(folder)
        self.architecture: Architecture = architecture_of(self.config)
        self._files: dict[str, Path] = {}
        self.schemes: dict[str, Scheme] = {}
        """Scheme of each quantised matrix, by module name: linears, and the embedding and head where they are."""
        self._headers: dict[str, tuple[str, tuple[int, ...]]] = {}
        for path in weight_files(folder):
            self._index(path)
        self._missing_prefix = self._detect_missing_prefix()
        self._layout = self._find_layout()
        self._unpacked: tuple[str, tuple[Tensor, Grid]] | None = None
        if self._layout:
            self.schemes.update(self._layout.schemes_in(self))

    def _index(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (a safe_open is not a mapping)
                    piece = file.get_slice(name)
                    self._files[name] = path
                    self._headers[name] = (piece.get_dtype(), tuple(piece.get_shape()))
                metadata = file.metadata() or {}
        except (SafetensorError, OSError) as error:
            raise DamagedCheckpointError(
                f"{path}: cannot be read as safetensors ({error}). The file is damaged or truncated; fetch it again."
            ) from error
        for module, scheme in json.loads(metadata.get(SCHEMES_KEY, "{}")).items():
            self.schemes[module] = Scheme.from_json(scheme)

    def _detect_missing_prefix(self) -> str:
        """Old checkpoints (GPT-2) lack the 'transformer.' that the model class puts before every name."""
        prefix = self.architecture.prefix + "."
        bare = self.architecture.blocks.removeprefix(prefix)
        if any(name.startswith(prefix) for name in self._files):
            return ""
        return prefix if any(name.startswith(bare + ".") for name in self._files) else ""

    def _find_layout(self) -> Layout | None:
        config = self.config.get("quantization_config")
        if not config:
            return None
        from compress.checkpoints.formats.layouts import layout_of

        return layout_of(config, self.names)

    def _stored_name(self, name: str) -> str:
        if self._missing_prefix and name not in self._files and name.startswith(self._missing_prefix):
            return name.removeprefix(self._missing_prefix)
        return name

    def _model_name(self, stored: str) -> str:
        if self._missing_prefix and not stored.startswith(self.architecture.head + "."):
            return self._missing_prefix + stored
        return stored

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of parameters as the model class spells them, sorted; not of buffers that old files hold, nor of a tied
        head that is stored as well."""
        names = sorted(self._model_name(name) for name in self._files if not name.endswith(NO_PARAMETERS))
        copied = f"{self.architecture.head}.weight" if self.head_stored_twice == "equal" else None
        return tuple(name for name in names if name != copied)

    @cached_property
    def head_stored_twice(self) -> Literal["", "equal", "differs"]:
        """Whether the config ties the head to the embedding and both are stored, and as what."""
        head, embedding = f"{self.architecture.head}.weight", f"{self.architecture.embedding}.weight"
        if not (self.has(head) and self.has(embedding) and says_tied(self.config)):
            return ""
        if any(self.header(name)[0] not in _FLOATS for name in (head, embedding)):
            return ""  # Integers, with scales of their own.
        if self.header(head)[1] != self.header(embedding)[1]:
            return "differs"
        first, second = self.read(head), self.read(embedding)
        narrow = min(first.dtype, second.dtype, key=lambda dtype: dtype.itemsize)
        # A copy may be a rounded one. Bytes, so that NaN equals itself: whoever looks for it tells of it.
        same = torch.equal(first.to(narrow).view(torch.uint8), second.to(narrow).view(torch.uint8))
        return "equal" if same else "differs"

    @cached_property
    def block_count(self) -> int:
        """Blocks whose tensors are here."""
        indices = [self.architecture.block_index(name) for name in self.names]
        return 1 + max(index for index in indices if index is not None)

    def quantised_owner(self, name: str) -> str | None:
        """The quantised linear that a stored tensor is a part of; None for plain tensors and for biases."""
        module, _, leaf = name.rpartition(".")
        if leaf == "bias" and module in self.schemes:
            return None
        while module:
            if module in self.schemes:
                return module
            module = module.rpartition(".")[0]
        return None

    @cached_property
    def kv_scales(self) -> tuple[str, ...]:
        """Names of the scales of an fp8 KV cache; empty where there are none."""
        return tuple(name for name in self.names if name.endswith(KV_SCALES))

    @property
    def is_understood(self) -> bool:
        """Whether quantised linears are read here, rather than through their own loader."""
        return self._layout is not None

    @property
    def precision_plan(self) -> dict[str, Scheme] | None:
        """The scheme that a stage before chose for each linear, by module name; None where none did."""
        path = self.folder / PLAN_FILE
        if not path.is_file():
            return None
        return {name: Scheme.from_json(scheme) for name, scheme in json.loads(path.read_text()).items()}

    @property
    def tied_head(self) -> bool:
        """Whether the head is the embedding: no head is stored, but for a copy of the embedding."""
        prefix = self.architecture.head + "."
        return not any(name.startswith(prefix) and not name.endswith(".bias") for name in self.names)

    @cached_property
    def weight_bytes(self) -> int:
        """Bytes of all tensors in the safetensors files."""
        return sum(self.tensor_bytes(name) for name in self.names)

    def tensor_bytes(self, name: str) -> int:
        dtype, shape = self.header(name)
        return int(torch.Size(shape).numel()) * _bytes_of(dtype)

    def header(self, name: str) -> tuple[str, tuple[int, ...]]:
        """(safetensors dtype name, shape) of a tensor."""
        return self._headers[self._stored_name(name)]

    def has(self, name: str) -> bool:
        return self._stored_name(name) in self._files

    def read(self, name: str) -> Tensor:
        """One stored tensor, as it is in the file."""
        stored = self._stored_name(name)
        try:
            path = self._files[stored]
        except KeyError:
            raise DamagedCheckpointError(f"{self.folder}: tensor {name} is missing from the weight files.") from None
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(stored)  # type: ignore[no-any-return]

    def dense(self, module: str) -> Tensor:
        """The weight of a module as a runtime computes with it, in the layout the module keeps it."""
        if module not in self.schemes:
            return self.read(f"{module}.weight")
        codes, grid = self.codes(module)
        value = dequantize(codes, grid)
        return value.T if self.is_transposed(module) else value

    def is_transposed(self, module: str) -> bool:
        """Whether a module keeps its weight as (inputs, outputs): embeddings and heads never do."""
        return self.architecture.transposed_linears and self.architecture.block_index(module) is not None

    def matrix(self, module: str) -> Tensor:
        """The weight of a linear as (rows, columns) = (outputs, inputs), whatever the module's own layout."""
        weight = self.dense(module)
        return weight.T if self.is_transposed(module) else weight

    def codes(self, module: str) -> tuple[Tensor, Grid]:
        """Codes int8 (rows, columns) and grid of a quantised linear."""
        scheme = self.schemes[module]
        if self._layout:
            # Whoever writes a linear again asks for its shape, codes and scales in turn: unpack it once.
            # Through a name of its own: another thread may unpack another module meanwhile.
            unpacked = self._unpacked
            if unpacked is None or unpacked[0] != module:
                unpacked = self._unpacked = module, self._layout.codes_of(self, module, scheme)
            return unpacked[1]
        if scheme.of_super_blocks:
            return self.read(f"{module}.codes"), super_block_grid(scheme, lambda leaf: self.read(f"{module}.{leaf}"))
        zero = self.read(f"{module}.zero_point") if not scheme.symmetric else None
        nested = None
        if scheme.nested:
            codes, absmax, table, offset = (self.read(f"{module}.nested_{leaf}") for leaf in NESTED)
            nested = Nested(codes, absmax, table, offset)
        return self.read(f"{module}.codes"), Grid(scheme, self.read(f"{module}.scale"), zero, nested)

    def matrix_shape(self, module: str) -> tuple[int, int]:
        """(rows, columns) of a linear, from headers where they tell."""
        if module in self.schemes and self.has(f"{module}.codes"):
            first, second = self.header(f"{module}.codes")[1]
            return first, second
        if module in self.schemes:
            return tuple(self.codes(module)[0].shape)  # type: ignore[return-value]
        first, second = self.header(f"{module}.weight")[1]
        return (second, first) if self.is_transposed(module) else (first, second)

    def module_tensors(self, prefix: str) -> list[str]:
        """Names of the stored tensors under a module. Scales of a KV cache are none of them: they belong to the model
        that they were calibrated on, and what a stage makes is another one."""
        kept = set(self.kv_scales)
        return [name for name in self.names if name.startswith(prefix + ".") and name not in kept]

    def dense_state(self, prefix: str) -> dict[str, Tensor]:
        """Every tensor under `prefix`, dense, by its name below the prefix: ready for load_state_dict."""
        state: dict[str, Tensor] = {}
        quantised = [module for module in self.schemes if module.startswith(prefix + ".") or module == prefix]
        for module in quantised:
            state[f"{module}.weight"] = self.dense(module)
        skip = tuple(module + "." for module in quantised)
        for name in self.module_tensors(prefix):
            if name.startswith(skip) and not name.endswith(".bias"):
                continue
            state[name] = self.read(name)
        return {name.removeprefix(prefix + "."): tensor for name, tensor in state.items()}

    def digest(self, stop: Event | None = None) -> str:
        """sha256 over the config and the bytes of every weight and tokenizer file, by sorted name. `stop`: as in
        `files.sha256_of`."""
        paths = sorted({*self._files.values(), *companion_files(self.folder)})
        return digest_of_json(digests_of(paths, stop))


def super_block_grid(scheme: Scheme, read: Callable[[str], Tensor]) -> Grid:
    """A grid of super-blocks from its parts, which `read` gives by name."""
    minimum = None if scheme.symmetric else read("super_minimum")
    if scheme.free_minima:
        return Grid.of_super_blocks(scheme, SuperBlocks(read("super_scale"), None, minimum))
    minima = None if scheme.symmetric else read("minimum")
    return Grid.of_super_blocks(scheme, SuperBlocks(read("super_scale"), read("scale"), minimum, minima))


def all_finite(tensor: Tensor) -> bool:
    """Whether a floating tensor has no NaN and no infinity. A piece at a time: what is compared stays in the cache."""
    return all(bool(torch.isfinite(piece).all()) for piece in torch.split(tensor.flatten(), 1 << 20))


def _bytes_of(dtype: str) -> int:
    sizes = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
    return sizes.get(dtype, 1)


def is_float(dtype: str) -> bool:
    """Whether a safetensors dtype name is one of plain weights: 16 to 64 bits of floating point."""
    return dtype in _FLOATS


def torch_dtype(name: str) -> torch.dtype:
    """torch dtype of a floating safetensors dtype name."""
    return _FLOATS[name]
