"""Function-preserving channel factors: move a model off the grid its weights were once quantised to.

Weights read from a 4-bit file take 16 values a group, and any 4-bit method looks lossless on them. Random factors
s = exp(U(-a, a)) per channel break the grid and cancel exactly wherever one tensor writes a channel and others read
it (`couplings`).
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import Tensor

from compress.architecture import Coupling, Dimensions, dimensions_of
from compress.checkpoints.couplings import to_columns, written
from compress.checkpoints.folder import companion_files
from compress.checkpoints.reader import Checkpoint
from compress.checkpoints.stream import Entry, write_sharded
from compress.errors import RecipeError


def rescale(source: Checkpoint, folder: Path, amplitude: float, seed: int) -> None:
    """Write a copy of `source` with rescaled channels. Arithmetic in float64, stored in the source's dtypes."""
    if not source.architecture.couplings:
        raise RecipeError(f"model.rescale: not defined for architecture {source.architecture.model_type}.")
    from transformers import AutoConfig

    dimensions = dimensions_of(AutoConfig.from_pretrained(source.folder))
    factors = _Factors(source, dimensions, amplitude, seed)
    entries = []
    for name in source.names:
        sample = source.read(name)
        entries.append(Entry(name, sample.dtype, tuple(sample.shape), lambda name=name: factors.apply(name)))  # type: ignore[misc]
    write_sharded(folder, entries)
    # config.json last: it marks the folder as complete.
    for path in sorted(companion_files(source.folder), key=lambda path: path.name == "config.json"):
        shutil.copyfile(path, folder / path.name)


class _Factors:
    """Factors of each block, drawn once per (block, coupling) from a generator seeded by both."""

    def __init__(self, source: Checkpoint, dimensions: Dimensions, amplitude: float, seed: int) -> None:
        self.source, self.dimensions = source, dimensions
        self.amplitude, self.seed = amplitude, seed

    def apply(self, name: str) -> Tensor:
        """The stored tensor `name` with every factor that concerns it."""
        arch = self.source.architecture
        tensor = self.source.read(name)
        block = arch.block_index(name)
        if block is None or not tensor.is_floating_point():
            return tensor
        module, _, leaf = name.removeprefix(arch.block_name(block) + ".").rpartition(".")
        value = tensor.double()
        for number, coupling in enumerate(arch.couplings):
            if module == coupling.writer:
                value = written(value, coupling, self._draw(block, number, coupling), arch.norm_offset)
            elif module in coupling.readers and leaf == "weight":
                value = value / to_columns(coupling, self._draw(block, number, coupling), self.dimensions)
        return value.to(tensor.dtype)

    def _draw(self, block: int, number: int, coupling: Coupling) -> Tensor:
        arch = self.source.architecture
        writer = f"{arch.block_name(block)}.{coupling.writer}.weight"
        size = self.source.header(writer)[1][0]
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + block * 101 + number)
        uniform = torch.rand(size, generator=generator, dtype=torch.float64)
        return torch.exp((uniform * 2 - 1) * self.amplitude)
