"""What shares a scheme: one linear, or those that a runtime fuses into one matrix; the embedding; the head."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from compress.architecture import Architecture


@dataclass(frozen=True)
class Unit:
    """What gets one scheme: q, k and v of a block, say, where they are fused, or its down projection alone."""

    block: int | None
    """None for the embedding and the head."""
    kind: str
    """The linears' last names, which units of all blocks have in common: 'q_proj+k_proj+v_proj'."""
    modules: tuple[str, ...]
    family: str
    """The kind that the unit would be of if runtimes fused its linears."""

    @property
    def name(self) -> str:
        return self.kind if self.block is None else f"block {self.block} {self.kind}"


def units_of(architecture: Architecture, modules: Collection[str], fused: bool) -> list[Unit]:
    """Units of the given linears (full names), in the order of the forward pass; others are left out. `fused`: whether
    the runtime makes one matrix of q, k, v and of gate, up."""
    blocks = sorted({index for name in modules if (index := architecture.block_index(name)) is not None})
    units = []
    for block in blocks:
        seen: set[str] = set()
        for linear in architecture.linears:
            together = next((each for each in architecture.fused if linear in each), (linear,))
            prefix = architecture.block_name(block)
            of_one = [f"{prefix}.{part}" for part in (together if fused else (linear,))]
            names = tuple(name for name in of_one if name in modules)
            if names and names[0] not in seen:
                seen.update(names)
                units.append(Unit(block, _leaves(names), names, _leaves(together)))
    return units


def _leaves(names: Collection[str]) -> str:
    return "+".join(name.rsplit(".", 1)[1] for name in names)
