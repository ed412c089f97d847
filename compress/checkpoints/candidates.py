"""Every candidate of every linear, kept beside a model: what a mixture of schemes is put together from.

    <folder>/candidates/block-00003.safetensors     <module>#<k>.codes, .scale and, where its scheme is asymmetric,
                                                    .zero_point: the linear in its k-th candidate

A model with one candidate chosen for each linear is read as any other checkpoint is, without being written.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from compress.checkpoints.reader import Checkpoint
from compress.files import atomic_path
from compress.quantization.grid import Grid, dequantize
from compress.quantization.scheme import Scheme

FOLDER = "candidates"


def write_candidates(folder: Path, block: int, found: Mapping[str, list[tuple[Tensor, Grid]]]) -> None:
    """Keep the candidates of one block's linears (codes (rows, columns) and grid each), in their order."""
    tensors = {}
    for module, options in found.items():
        for number, (codes, grid) in enumerate(options):
            tensors[f"{module}#{number}.codes"] = codes.cpu().contiguous()
            tensors[f"{module}#{number}.scale"] = grid.scale.cpu().contiguous()
            if grid.zero is not None:
                tensors[f"{module}#{number}.zero_point"] = grid.zero.cpu().contiguous()
    path = _path(folder, block)
    path.parent.mkdir(exist_ok=True)
    with atomic_path(path) as temporary:
        save_file(tensors, temporary)


class Assigned(Checkpoint):
    """The model in `folder` with linears replaced by the candidates in `chosen` (module -> number)."""

    def __init__(self, folder: Path, schemes: Mapping[str, list[Scheme]], chosen: Mapping[str, int]) -> None:
        super().__init__(folder)
        self._candidates, self.chosen = schemes, chosen

    def dense_state(self, prefix: str) -> dict[str, Tensor]:
        state = super().dense_state(prefix)
        modules = [module for module in self.chosen if module.startswith(prefix + ".")]
        block = self.architecture.block_index(prefix + ".")
        if not modules or block is None:
            return state
        with safe_open(_path(self.folder, block), framework="pt") as file:
            for module in modules:
                number = self.chosen[module]
                scheme = self._candidates[module][number]
                zero = None if scheme.symmetric else file.get_tensor(f"{module}#{number}.zero_point")
                grid = Grid(scheme, file.get_tensor(f"{module}#{number}.scale"), zero)
                value = dequantize(file.get_tensor(f"{module}#{number}.codes"), grid)
                leaf = f"{module.removeprefix(prefix + '.')}.weight"
                state[leaf] = value.T if self.architecture.transposed_linears else value
        return state


def _path(folder: Path, block: int) -> Path:
    return folder / FOLDER / f"block-{block:05d}.safetensors"
