"""Scales for a KV cache in fp8, calibrated and written into the checkpoint: half the cache's bytes.

Weights stay as they are. The walk runs once, each block with a cache that remembers the largest key and value of every
head; the scales go beside the block's tensors as `self_attn.k_scale` and `v_scale`, the names that compressed-tensors
and vLLM read. Evaluation after it computes with rounded keys and values, so gates judge what a runtime will serve that
keeps its cache so.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from compress.architecture import Architecture, Dimensions
from compress.calibration.walk import forward_of
from compress.checkpoints.reader import KV_SCALES
from compress.checkpoints.skeleton import Skeleton
from compress.memory.measure import release
from compress.quantization.kv_cache import SeenCache, scale_of
from compress.quantization.scheme import Scheme
from compress.stages.base import Shapes, Stage, StageContext, StageOutcome
from compress.training.clock import Clock

ATTENTION = "self_attn"


class KvCache(Stage):
    """Calibrate scales for keys and values in fp8. Goes last; needs export.format: compressed-tensors."""

    kind: Literal["kv_cache"] = "kv_cache"
    dtype: Literal["fp8"] = Field(default="fp8", description="e4m3, 8 bits")
    per: Literal["tensor", "head"] = Field(
        default="tensor", description="one scale for a layer's keys and one for its values, or one for each head"
    )
    needs_calibration: ClassVar[bool] = True

    @property
    def kv_bytes(self) -> int:
        return 1

    def check(self, shapes: Shapes, architecture: Architecture) -> list[str]:
        if all(name.startswith((ATTENTION, "mlp")) for name in architecture.linears):
            return []
        return [f"{architecture.model_type}: its attention is not known by the name {ATTENTION}, which runtimes read"]

    def schemes(self, shapes: Shapes) -> dict[str, Scheme]:
        return {}

    def added_bytes(self, dimensions: Dimensions, stored_bytes: int) -> int:
        return 2 * dimensions.blocks * (dimensions.kv_heads if self.per == "head" else 1) * stored_bytes

    @torch.no_grad()
    def apply(self, context: StageContext) -> StageOutcome:
        assert context.windows is not None, "the pipeline gives calibration windows to stages that need them"
        source, output = context.source, context.output
        skeleton = Skeleton(source.config, context.device, context.compute)
        batches = context.windows.batches(context.tokens_at_once)
        clock, found = Clock("forward", "write"), []
        output.write_outer(source)
        with clock.timed("forward"):
            states = skeleton.embed(source, batches)
        with context.progress.task("kv_cache", skeleton.block_count) as advance:
            for index in range(skeleton.block_count):
                with clock.timed("forward"):
                    states, seen = _walk(skeleton, context, index, states)
                record = output.block_record(index)
                if record is None:
                    with clock.timed("write"):
                        record = self._write(context, index, seen)
                    context.after_block(index)
                found.append(record["largest"])
                release()
                advance(f"block {index + 1}/{skeleton.block_count}")
        facts = {"dtype": self.dtype, "per": self.per, "largest": found}
        return StageOutcome([], [], clock.seconds, facts)

    def _write(self, context: StageContext, index: int, seen: SeenCache) -> dict[str, Any]:
        """The block as it was, with its two scales."""
        assert seen.largest is not None, "the block's attention asked its cache for nothing"
        prefix = f"{context.source.architecture.block_name(index)}.{ATTENTION}"
        scales = [scale_of(largest, self.per == "head", context.stored).cpu() for largest in seen.largest]
        added: dict[str, Tensor] = {f"{prefix}.{leaf}": scale for leaf, scale in zip(KV_SCALES, scales, strict=True)}
        largest = [float(each.amax()) for each in seen.largest]
        record = {"modules": [], "events": [], "largest": {"block": index, "keys": largest[0], "values": largest[1]}}
        context.output.write_block(context.source, index, {}, record, added=added)
        return record


def _walk(
    skeleton: Skeleton, context: StageContext, index: int, states: list[Tensor]
) -> tuple[list[Tensor], SeenCache]:
    """States after block `index`, and what its cache saw."""
    assert context.windows is not None
    batches = context.windows.batches(context.tokens_at_once)
    forward, seen = forward_of(skeleton, batches, index), SeenCache()
    with skeleton.loaded(context.source, skeleton.architecture.block_name(index)) as block:
        skeleton.cache = seen
        return [forward(block, number, hidden) for number, hidden in enumerate(states)], seen
