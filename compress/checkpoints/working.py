"""The layout stages write: one file a block, so that a finished block is a resume point.

    block-00003.safetensors   tensors of block 3; for a quantised linear <module>.codes (int8, one code a byte),
                              <module>.scale (stored dtype), <module>.zero_point (int8, asymmetric only),
                              <module>.nested_* (nested scales only), or for K-quants <module>.scale and .minimum
                              (int8) with .super_scale and .super_minimum (float16, a super-block), the last two alone
                              for free minima; the schemes are in the file's metadata
    block-00003.json          what was done to each linear (written after the tensors: it marks the block as finished)
    outer.safetensors         everything outside the blocks, embedding and head as codes where a stage rounded them
    precision.json            the scheme that later stages should give each linear, where one chose them
    candidates/               every linear in several schemes, where a stage solved them (see `candidates`)
    scratch/                  what a stage itself goes on from after a kill; removed when it is finished
    stage.json                written last: it marks the stage as finished

Codes are kept a byte each rather than packed: every export format packs differently.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from compress.checkpoints.folder import companion_files
from compress.checkpoints.reader import NESTED, PLAN_FILE, SCHEMES_KEY, Checkpoint
from compress.checkpoints.stream import Entry, write_safetensors
from compress.files import atomic_path, write_json
from compress.quantization.grid import Grid
from compress.quantization.scheme import Scheme
from compress.quantization.super_blocks import SuperBlocks

STAGE_FILE = "stage.json"


class WorkingCheckpoint:
    """A stage's output folder while it is being written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def scratch(self) -> Path:
        """A folder for what the stage goes on from after a kill. It outlives `apply`, until `finish` removes it."""
        return self.folder / "scratch"

    def is_finished(self) -> bool:
        return (self.folder / STAGE_FILE).is_file()

    def record(self) -> dict[str, Any]:
        """What `finish` wrote."""
        return _read(self.folder / STAGE_FILE)

    def block_record(self, index: int) -> dict[str, Any] | None:
        """What `write_block` recorded, or None if the block is not finished."""
        path = self.folder / f"block-{index:05d}.json"
        return _read(path) if path.is_file() else None

    def write_block(
        self,
        source: Checkpoint,
        index: int,
        quantised: dict[str, tuple[Tensor, Grid]],
        record: dict[str, Any],
        replaced: Mapping[str, Tensor] | None = None,
        added: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write block `index`: new codes and grids for the modules in `quantised`, the rest as it is in `source`.

        `replaced` gives new values to plain tensors of the block, by full name (norm weights); `added` are new ones.
        """
        prefix = source.architecture.block_name(index)
        tensors: dict[str, Tensor] = dict(added or {})
        schemes = {name: scheme for name, scheme in source.schemes.items() if name.startswith(prefix + ".")}
        for name in source.module_tensors(prefix):
            module, _, leaf = name.rpartition(".")
            if source.quantised_owner(name) or (module in quantised and leaf != "bias"):
                continue
            new = None if replaced is None else replaced.get(name)
            tensors[name] = source.read(name) if new is None else new.cpu().contiguous()
        kept = {module: source.codes(module) for module in schemes if module not in quantised}
        for module, (codes, grid) in {**kept, **quantised}.items():
            schemes[module] = grid.scheme
            tensors |= parts_of(module, codes, grid)
        self.write_tensors(index, tensors, record, schemes)

    def write_tensors(
        self,
        index: int,
        tensors: dict[str, Tensor],
        record: dict[str, Any],
        schemes: Mapping[str, Scheme] | None = None,
    ) -> None:
        """Write block `index` from its tensors by full name; `schemes` of the linears among them that are codes."""
        with atomic_path(self.folder / f"block-{index:05d}.safetensors") as temporary:
            save_file(tensors, temporary, _labels(schemes or {}))
        write_json(self.folder / f"block-{index:05d}.json", record)

    def write_outer(
        self,
        source: Checkpoint,
        replaced: Mapping[str, Tensor] | None = None,
        config: Mapping[str, Any] | None = None,
        quantised: Mapping[str, tuple[Tensor, Grid]] | None = None,
    ) -> None:
        """Copy everything outside the blocks, and the files that travel with a model.

        `replaced` gives new values to tensors outside the blocks, by full name (the final norm); `config` is the
        model's where its sizes changed; `quantised` are new codes and grids of the embedding or the head.
        """
        new = dict(quantised or {})
        kept = {
            module: source.codes(module)
            for module in source.schemes
            if source.architecture.block_index(module) is None and module not in new
        }
        entries = []
        for name in source.names:
            module, _, leaf = name.rpartition(".")
            inside = source.architecture.block_index(name) is not None
            if inside or source.quantised_owner(name) or (module in new and leaf != "bias"):
                continue
            entries.append(_entry(source, name, replaced or {}))
        schemes = {}
        for module, (codes, grid) in {**kept, **new}.items():
            schemes[module] = grid.scheme
            for name, tensor in parts_of(module, codes, grid).items():
                entries.append(_held(name, tensor))
        write_safetensors(self.folder / "outer.safetensors", entries, _labels(schemes))
        for path in companion_files(source.folder):
            if path.name != "config.json":
                shutil.copyfile(path, self.folder / path.name)
        if (source.folder / PLAN_FILE).is_file():
            shutil.copyfile(source.folder / PLAN_FILE, self.folder / PLAN_FILE)
        config = source.config if config is None else config
        kept = {key: value for key, value in config.items() if key != "quantization_config"}
        write_json(self.folder / "config.json", kept)

    def write_plan(self, plan: Mapping[str, Scheme]) -> None:
        """Keep a scheme for every linear that later stages will quantise."""
        write_json(self.folder / PLAN_FILE, {module: scheme.to_json() for module, scheme in plan.items()})

    def finish(self, record: dict[str, Any]) -> None:
        write_json(self.folder / STAGE_FILE, record)
        shutil.rmtree(self.scratch, ignore_errors=True)


def parts_of(module: str, codes: Tensor, grid: Grid) -> dict[str, Tensor]:
    """The tensors that a quantised matrix is kept as, by full name."""
    made_of = grid.nested
    if isinstance(made_of, SuperBlocks):
        parts = {
            "codes": codes,
            "scale": made_of.scales,
            "super_scale": made_of.scale,
            "minimum": made_of.minima,
            "super_minimum": made_of.minimum,
        }
        return {f"{module}.{leaf}": each.cpu().contiguous() for leaf, each in parts.items() if each is not None}
    tensors = {f"{module}.codes": codes.cpu().contiguous(), f"{module}.scale": grid.scale.cpu().contiguous()}
    if grid.zero is not None:
        tensors[f"{module}.zero_point"] = grid.zero.cpu().contiguous()
    if made_of is not None:
        tensors |= {f"{module}.nested_{leaf}": getattr(made_of, leaf).cpu().contiguous() for leaf in NESTED}
    return tensors


def _labels(schemes: Mapping[str, Scheme]) -> dict[str, str]:
    """The schemes of a file's quantised matrices, for its metadata."""
    return {SCHEMES_KEY: json.dumps({name: scheme.to_json() for name, scheme in sorted(schemes.items())})}


def _entry(source: Checkpoint, name: str, replaced: Mapping[str, Tensor]) -> Entry:
    if name in replaced:
        return _held(name, replaced[name])
    tensor_dtype, shape = source.header(name)
    from compress.checkpoints.stream import DTYPE_NAMES

    dtype = next(dtype for dtype, label in DTYPE_NAMES.items() if label == tensor_dtype)
    return Entry(name, dtype, shape, lambda: source.read(name))


def _held(name: str, tensor: Tensor) -> Entry:
    """A tensor that is in memory already."""
    return Entry(name, tensor.dtype, tuple(tensor.shape), lambda: tensor)


def _read(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return value
