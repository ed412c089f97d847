"""What a format of artifacts is: what it can hold, and how it is written. One file a format, listed in `formats`."""

from __future__ import annotations

import importlib.util
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from compress.architecture import Architecture
from compress.checkpoints.folder import tokenizer_files
from compress.checkpoints.reader import Checkpoint, all_finite
from compress.checkpoints.stream import Entry, write_sharded
from compress.errors import RecipeError
from compress.events import Event
from compress.files import write_json
from compress.quantization.grid import Grid, dequantize
from compress.quantization.scheme import Scheme

Shapes = Mapping[str, tuple[int, int]]
"""(rows, columns) of linears, by full module name."""


@dataclass(frozen=True)
class Written:
    """Tensor bytes of an export, and what the format had to leave out."""

    bytes: int
    events: tuple[Event, ...] = ()


class Format(ABC):
    """A layout of model files. Subclasses say what they can express before work starts, and write it."""

    name: ClassVar[str]
    description: ClassVar[str]
    packs: ClassVar[bool]
    """Whether quantised linears stay packed, so that the files are smaller."""
    loader_needs: ClassVar[tuple[str, ...]] = ()
    """Modules that transformers needs beside itself to load it."""
    keeps_kv_scales: ClassVar[bool] = False
    """Whether scales of an fp8 KV cache have a place in it."""
    vocabulary: ClassVar[Literal["kept", "head", "any"]] = "kept"
    """Whether embedding and head can be quantised in it: neither, a head of its own, or both, also as one."""
    fuses: ClassVar[bool] = True
    """Whether runtimes that read it make one matrix of q, k, v and of gate, up."""
    transposed_linears: ClassVar[bool] = False
    """Whether GPT-2's Conv1D can be quantised in it."""

    @abstractmethod
    def refusal(self, scheme: Scheme, rows: int, columns: int) -> str | None:
        """Why a linear with that scheme and shape cannot be expressed, as the end of a sentence; None if it can."""

    def mistakes(self, schemes: Mapping[str, Scheme], shapes: Shapes, architecture: Architecture) -> list[str]:
        """Sentences about what the format cannot hold of a whole model: linears by reason, and what `refuses` says."""
        found = []
        if architecture.transposed_linears and not self.transposed_linears:
            found.append(
                f"{self.name} cannot hold the transposed linears (Conv1D) of {architecture.model_type}: loaders "
                "quantise nn.Linear only"
            )
        reasons: dict[str, list[str]] = {}
        for module, scheme in schemes.items():
            reason = self.refusal(scheme, *shapes[module])
            if reason:
                reasons.setdefault(f"{scheme.label}: {reason}", []).append(module)
        for reason, modules in reasons.items():
            more = f" (and {len(modules) - 1} more like it)" if len(modules) > 1 else ""
            found.append(f"{self.name} cannot hold {modules[0]}{more} in {reason}")
        return [
            *found,
            *self._refuses_vocabulary(schemes, shapes, architecture),
            *self.refuses(schemes, shapes, architecture),
        ]

    def _refuses_vocabulary(
        self, schemes: Mapping[str, Scheme], shapes: Shapes, architecture: Architecture
    ) -> list[str]:
        """What it cannot hold of a quantised embedding and head; `shapes` has the head if it is not tied."""
        modules = [module for module in (architecture.embedding, architecture.head) if module in schemes]
        if modules and self.vocabulary == "kept":
            return [f"{self.name} keeps embedding and head in 16 bits; leave {' and '.join(modules)} as they are"]
        if architecture.embedding in modules and self.vocabulary == "head":
            remedy = "the head is tied to it, so both stay in 16 bits"
            if architecture.head in shapes:
                remedy = "use parts: head"
            return [
                f"{self.name} cannot hold a quantised embedding: transformers unpacks linears only, so the model would "
                f"not run; {remedy}"
            ]
        return []

    def refuses(self, schemes: Mapping[str, Scheme], shapes: Shapes, architecture: Architecture) -> list[str]:
        """What is wrong with the model as a whole, though each linear could be expressed."""
        del schemes, shapes, architecture
        return []

    def loader_lacks(self) -> tuple[str, ...]:
        """Those of `loader_needs` that are not installed here."""
        return tuple(name for name in self.loader_needs if importlib.util.find_spec(name) is None)

    @abstractmethod
    def stored_bytes(self, scheme: Scheme, rows: int, columns: int, dtype_bytes: int) -> int:
        """Bytes that the weight of one quantised linear takes in the files, without its bias."""

    def other_bytes(self, shape: tuple[int, ...], dtype_bytes: int) -> int:
        """Bytes of a tensor that is not quantised."""
        return int(torch.Size(shape).numel()) * dtype_bytes

    def added_bytes(self, config: Mapping[str, Any]) -> int:
        """Bytes of tensors that the files have and the model has not."""
        del config
        return 0

    def reading_bytes(self, parameters: int) -> int:
        """Bytes of the cache that it takes to read the files back."""
        del parameters
        return 0

    def stays_packed(self, schemes: Iterable[Scheme]) -> bool:
        """Whether transformers keeps such linears packed once it has loaded them."""
        del schemes
        return self.packs

    def refuses_config(self, config: Mapping[str, Any]) -> list[str]:
        """What is wrong with a model that its config tells and its architecture does not."""
        del config
        return []

    @abstractmethod
    def write(self, source: Checkpoint, folder: Path, dtype: torch.dtype, shard_bytes: int) -> Written:
        """Write a working or plain checkpoint as public files into an empty folder.

        Floating tensors outside quantised linears are cast to `dtype`; a value that does not fit raises RecipeError.
        """


def write_folder(
    source: Checkpoint,
    folder: Path,
    entries: Iterable[Entry],
    dtype: torch.dtype,
    shard_bytes: int,
    quantization: Mapping[str, Any] | None,
    also: Mapping[str, Any] | None = None,
) -> Written:
    """A Hugging Face model folder: safetensors, config.json with its section on quantisation and what else is to be in
    it (`also`), tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    total = write_sharded(folder, entries, shard_bytes)
    config = {key: value for key, value in source.config.items() if key not in ("torch_dtype", "quantization_config")}
    config["dtype"] = str(dtype).removeprefix("torch.")
    config |= also or {}
    if quantization:
        config["quantization_config"] = dict(quantization)
    write_json(folder / "config.json", config)
    for path in tokenizer_files(source.folder):
        shutil.copyfile(path, folder / path.name)
    return Written(total)


def entries_of(
    source: Checkpoint, dtype: torch.dtype, quantised: Callable[[str, Scheme], list[Entry]]
) -> Iterable[Entry]:
    """Every tensor in the order of names: `quantised(module, scheme)` gives those of a quantised linear, the rest is
    cast to `dtype`."""
    done: set[str] = set()
    for name in source.names:
        module = source.quantised_owner(name)
        if module is None:
            yield dense_entry(source, name, dtype)
        elif module not in done:
            done.add(module)
            yield from quantised(module, source.schemes[module])


def dense_entry(source: Checkpoint, name: str, dtype: torch.dtype) -> Entry:
    """A tensor as it is, or cast where it is floating."""
    stored, shape = source.header(name)
    if stored not in ("F64", "F32", "F16", "BF16"):
        sample = source.read(name)
        return Entry(name, sample.dtype, shape, lambda: source.read(name))
    return Entry(name, dtype, shape, lambda: cast(source.read(name), dtype, name))


def cast(tensor: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """`tensor` in `dtype`. Raises RecipeError naming the tensor where finite values leave the dtype's range."""
    value = tensor.to(dtype)
    if value.dtype != tensor.dtype and not all_finite(value) and all_finite(tensor):
        raise _outside(name, float(tensor.abs().max()), dtype)
    return value


def servable_scale(source: Checkpoint, module: str) -> torch.Tensor:
    """The scales (rows, groups) of a quantised linear. Raises RecipeError where a loader, which multiplies codes with
    them in their own dtype, would get a value outside its range."""
    codes, grid = source.codes(module)
    _check_products(codes, grid, module)
    return grid.scale


def servable_values(source: Checkpoint, module: str, dtype: torch.dtype) -> torch.Tensor:
    """The values of a quantised linear in `dtype`. Raises RecipeError where one is outside the range of that, or of its
    scales' own."""
    _check_products(*source.codes(module), module)
    return cast(source.dense(module), dtype, f"{module}.weight")


def _check_products(codes: torch.Tensor, grid: Grid, module: str) -> None:
    if float(grid.scale.abs().max()) * 2 ** (grid.scheme.bits + 1) < torch.finfo(grid.scale.dtype).max:
        return  # No code is so large, with a zero point or without.
    values = dequantize(codes, Grid(grid.scheme, grid.scale.float(), grid.zero))
    largest = float(values.abs().max())
    if largest > torch.finfo(grid.scale.dtype).max:
        raise _outside(f"{module}.weight", largest, grid.scale.dtype)


def _outside(name: str, largest: float, dtype: torch.dtype) -> RecipeError:
    return RecipeError(
        f"export.dtype: {name} holds values up to {largest:.3g}, outside the range of "
        f"{str(dtype).removeprefix('torch.')}. Use export.dtype: bfloat16."
    )


def dense_linears(source: Checkpoint) -> list[str]:
    """nn.Linear modules that stay dense: unquantised ones in blocks, and the head."""
    arch = source.architecture
    linears = [f"{arch.block_name(index)}.{name}" for index in range(source.block_count) for name in arch.linears]
    return [name for name in (arch.head, *linears) if name not in source.schemes]
