"""Every candidate of every linear, kept beside a model: what a mixture of schemes is put together from.

    candidates/block-00003.safetensors           <module>#<k>.codes, .scale and, where its scheme is asymmetric,
                                                 .zero_point: the linear in its k-th candidate. Codes of up to 4 bits
                                                 lie two in a byte, those of even columns in its lower half
    candidates/outer-<module>#<k>.safetensors    the same of the embedding and the head, where they are chosen for
    candidates/outer.json                        what those cost, and their bytes
    candidates/alone.json                        what groups of linears cost alone, measured: by name, [number of the
                                                 candidate, nats a token]

A candidate that leaves a matrix in 16 bits is the model's own, and is not kept. A model with one candidate chosen for
each matrix is read as any other checkpoint is, without being written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from compress.checkpoints.reader import Checkpoint, super_block_grid
from compress.checkpoints.working import WorkingCheckpoint, parts_of
from compress.errors import RecipeError
from compress.files import atomic_path, write_json
from compress.quantization.grid import Grid
from compress.quantization.scheme import Option, Scheme

FOLDER = "candidates"
OUTER_RECORDS = Path(FOLDER) / "outer.json"
ALONE_RECORDS = Path(FOLDER) / "alone.json"


def write_candidates(folder: Path, block: int, found: Mapping[str, list[tuple[Tensor, Grid] | None]]) -> None:
    """Keep the candidates of one block's linears (codes (rows, columns) and grid each), in their order."""
    tensors: dict[str, Tensor] = {}
    for module, options in found.items():
        for number, option in enumerate(options):
            if option is not None:
                kept = _kept(f"{module}#{number}", *option)
                # One option under two numbers; a file holds no tensor twice.
                again = any(option is each for each in options[:number])
                tensors |= {name: tensor.clone() for name, tensor in kept.items()} if again else kept
    _write(_path(folder, block), tensors)


def write_outer_candidate(folder: Path, module: str, number: int, codes: Tensor, grid: Grid) -> None:
    """Keep one candidate of the embedding or the head: a file each, since a vocabulary is large."""
    _write(_outer_path(folder, module, number), _kept(f"{module}#{number}", codes, grid))


def write_outer_records(folder: Path, records: Mapping[str, list[dict[str, Any]]]) -> None:
    """Keep what is known of the candidates of the embedding and the head, as blocks' records have it for linears.
    Written last: it marks them as finished."""
    write_json(folder / OUTER_RECORDS, dict(records))


def outer_records(folder: Path) -> dict[str, list[dict[str, Any]]] | None:
    """What was kept, or None where they are not finished or were not asked for."""
    path = folder / OUTER_RECORDS
    if not path.is_file():
        return None
    found: dict[str, list[dict[str, Any]]] = json.loads(path.read_text(encoding="utf-8"))
    return found


def candidates_in(folder: Path, blocks: int) -> dict[str, list[dict[str, Any]]]:
    """What is known of the candidates of every matrix: scheme, predicted cost in nats a token, bytes; by module, in
    order. Raises RecipeError where nobody solved any."""
    finished = WorkingCheckpoint(folder)
    found: dict[str, list[dict[str, Any]]] = {}
    for index in range(blocks):
        record = finished.block_record(index) or {}
        if "candidates" not in record:
            raise RecipeError("mixed_precision: its input has no candidates; a sensitivity stage comes right before it")
        found.update(record["candidates"])
    return found | (outer_records(folder) or {})


def write_alone_records(folder: Path, records: Mapping[str, tuple[int, float]]) -> None:
    """Keep what was measured of units alone: the candidate's number, and the divergence in nats a token."""
    write_json(folder / ALONE_RECORDS, dict(records))


def alone_records(folder: Path) -> dict[str, tuple[int, float]]:
    """What was kept so far; nothing where units were not measured alone."""
    path = folder / ALONE_RECORDS
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {name: (int(number), float(kl)) for name, (number, kl) in found.items()}


class Assigned(Checkpoint):
    """The model in `folder` with matrices replaced by the candidates in `chosen` (module -> number), which are kept
    beside it, or beside the one in `kept`."""

    def __init__(
        self,
        folder: Path,
        schemes: Mapping[str, list[Option]],
        chosen: Mapping[str, int],
        kept: Path | None = None,
    ) -> None:
        super().__init__(folder)
        self._kept = kept or folder
        self._numbers = {module: number for module, number in chosen.items() if schemes[module][number] is not None}
        for module, number in self._numbers.items():
            scheme = schemes[module][number]
            assert scheme is not None
            self.schemes[module] = scheme

    def codes(self, module: str) -> tuple[Tensor, Grid]:
        """Codes int8 (rows, columns) and grid of a matrix: of its candidate where it has one."""
        if module not in self._numbers:
            return super().codes(module)
        number, block, scheme = self._numbers[module], self.architecture.block_index(module), self.schemes[module]
        path = _outer_path(self._kept, module, number) if block is None else _path(self._kept, block)
        with safe_open(path, framework="pt") as file:
            if scheme.of_super_blocks:
                grid = super_block_grid(scheme, lambda leaf: file.get_tensor(f"{module}#{number}.{leaf}"))
                return _unpacked(file.get_tensor(f"{module}#{number}.codes")), grid
            zero = None if scheme.symmetric else file.get_tensor(f"{module}#{number}.zero_point")
            grid = Grid(scheme, file.get_tensor(f"{module}#{number}.scale"), zero)
            return _unpacked(file.get_tensor(f"{module}#{number}.codes")), grid


def _kept(label: str, codes: Tensor, grid: Grid) -> dict[str, Tensor]:
    if _halved(grid.scheme, codes.shape[1]):
        unsigned = codes.cpu().add(8).view(torch.uint8)
        codes = unsigned[:, 0::2] | unsigned[:, 1::2] << 4
    return parts_of(label, codes, grid)


def _unpacked(kept: Tensor) -> Tensor:
    """Codes int8 (rows, columns) of what `_kept` made of them."""
    if kept.dtype != torch.uint8:
        return kept
    return torch.stack([kept & 15, kept >> 4], -1).flatten(1).view(torch.int8).sub_(8)


def _halved(scheme: Scheme, columns: int) -> bool:
    return scheme.bits <= 4 and columns % 2 == 0


def kept_bytes(scheme: Scheme, rows: int, columns: int) -> int:
    """Bytes of a candidate's codes in the cache."""
    return rows * columns // (2 if _halved(scheme, columns) else 1)


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    path.parent.mkdir(exist_ok=True)
    with atomic_path(path) as temporary:
        save_file(tensors, temporary)


def _path(folder: Path, block: int) -> Path:
    return folder / FOLDER / f"block-{block:05d}.safetensors"


def _outer_path(folder: Path, module: str, number: int) -> Path:
    return folder / FOLDER / f"outer-{module}#{number}.safetensors"
