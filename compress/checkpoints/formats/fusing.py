"""Matrices that a runtime makes of several linears, q, k, v or gate, up, and parts of them in schemes of their own.

vLLM looks one scheme up for all parts, so it fails on what is mixed inside one, or computes other values.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from compress.architecture import Architecture
from compress.checkpoints.formats.base import dense_linears
from compress.checkpoints.reader import Checkpoint
from compress.events import Event
from compress.quantization.scheme import Scheme


def fused_that_differ(schemes: Mapping[str, Scheme], linears: Collection[str], architecture: Architecture) -> list[str]:
    """For each way in which parts of one fused matrix have schemes of their own, the first block and the parts, as in
    'model.layers.0: gate_proj int3 symmetric group 64, up_proj int4 symmetric group 64'. `linears`: full names."""
    found: dict[str, str] = {}
    blocks = {architecture.block_index(module) for module in linears}
    for block in sorted(index for index in blocks if index is not None):
        for fused in architecture.fused:
            names = [f"{architecture.block_name(block)}.{name}" for name in fused]
            labels = [scheme.label if (scheme := schemes.get(name)) else "unquantised" for name in names]
            if len(set(labels)) > 1:
                parts = ", ".join(
                    f"{name.rsplit('.', 1)[1]} {label}" for name, label in zip(fused, labels, strict=True)
                )
                found.setdefault(parts, f"{architecture.block_name(block)}: {parts}")
    return list(found.values())


def events_of_fusing(source: Checkpoint) -> list[Event]:
    """One event where the linears of a checkpoint are mixed inside what vLLM fuses."""
    linears = (*source.schemes, *dense_linears(source))
    found = fused_that_differ(source.schemes, linears, source.architecture)
    if not found:
        return []
    where, _, parts = found[0].partition(": ")
    more = f", and {len(found) - 1} other ways of it" if len(found) > 1 else ""
    return [Event("fused_apart", where, f"{parts}{more}: transformers loads them, vLLM does not serve them")]
