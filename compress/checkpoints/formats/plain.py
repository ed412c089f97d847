"""Dense 16-bit safetensors that carry the quantised values: any loader, no memory saved."""

from __future__ import annotations

from pathlib import Path

import torch

from compress.checkpoints.formats.base import Format, Written, entries_of, servable_values, write_folder
from compress.checkpoints.reader import Checkpoint
from compress.checkpoints.stream import Entry
from compress.quantization.scheme import Scheme


class Plain(Format):
    """Values written out."""

    name = "plain"
    description = "dense safetensors with the quantised values written out; loads anywhere, saves no memory"
    packs = False
    vocabulary = "any"
    fuses = False
    transposed_linears = True

    def refusal(self, scheme: Scheme, rows: int, columns: int) -> str | None:
        return "its values do not say that inputs are rounded" if scheme.inputs else None

    def stored_bytes(self, scheme: Scheme, rows: int, columns: int, dtype_bytes: int) -> int:
        return rows * columns * dtype_bytes

    def write(self, source: Checkpoint, folder: Path, dtype: torch.dtype, shard_bytes: int) -> Written:
        def quantised(module: str, scheme: Scheme) -> list[Entry]:
            rows, columns = source.matrix_shape(module)
            own = (columns, rows) if source.is_transposed(module) else (rows, columns)
            return [Entry(f"{module}.weight", dtype, own, lambda: servable_values(source, module, dtype))]

        return write_folder(source, folder, entries_of(source, dtype, quantised), dtype, shard_bytes, None)
