"""What linears multiply in while a model trains, or text walks through it: bfloat16 on CPUs with units for it.

Mixed precision as in arXiv 1710.03740: products take bfloat16 and add up in float32; parameters, their steps, norms,
losses and all judging stay as they are. On a CPU with AMX that is several times as many operations a second where
matrices are hundreds wide, with AVX512-BF16 (Zen 4) up to twice as many: a training step of SmolLM2-135M takes 0.66 of
its time in float32. At a width of a hundred the casts cost more than they save.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch

from compress.checkpoints.skeleton import Skeleton

Products = Literal["auto", "float32", "bfloat16"]
WHILE_WALKING = (
    "what linears multiply in during calibration on a CPU: bfloat16 is faster on processors with units for it (AMX, "
    "AVX512-BF16: auto takes it there), and sums over inputs, H among them, are of 8-bit integers then where the "
    "processor multiplies those exactly (VNNI, AMX), in float32 elsewhere; solving stays in float32. A GPU multiplies "
    "in the dtype it computes in"
)
"""What a stage's field says that chooses for its walk over calibration text."""


def chosen(asked: Products, device: torch.device, compute: torch.dtype) -> torch.dtype:
    """The dtype of products. `auto`: bfloat16 on a CPU with units for it, else what the walk computes in."""
    if asked == "auto":
        return torch.bfloat16 if device.type == "cpu" and has_units_for_bfloat16() else compute
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[asked]


def chosen_for_walks(asked: Products, device: torch.device, compute: torch.dtype) -> torch.dtype:
    """The dtype of products while calibration text walks through the blocks: `compute` on a GPU, whatever is asked."""
    return chosen(asked, device, compute) if device.type == "cpu" else compute


def has_units_for_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 faster than float32, by AMX or AVX-512."""
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def multiplying_in(products: torch.dtype, skeleton: Skeleton) -> AbstractContextManager[object]:
    """Linears inside multiply in `products`; nothing changes where they do already."""
    if products == skeleton.dtype or products != torch.bfloat16:
        return nullcontext()
    return torch.autocast(skeleton.device.type, products)
