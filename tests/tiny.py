"""Random models of every architecture, small enough for milliseconds; sliding windows are shorter than the texts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.calibration.windows import Windows, digest_of
from compress.checkpoints.formats.bitsandbytes import without_cpu_kernel
from compress.checkpoints.reader import Checkpoint
from compress.checkpoints.working import WorkingCheckpoint
from compress.events import Progress, Quiet
from compress.memory.predict import WalkLoad
from compress.stages import Stage, StageContext, StageOutcome

CPU = torch.device("cpu")
VOCABULARY = 160
_SLIDING, _FULL = "sliding_attention", "full_attention"
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_SLIDES: dict[str, Any] = {"sliding_window": 8, "layer_types": [_SLIDING, _FULL]}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 8},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 1, **_SLIDES},
    "qwen3": {"head_dim": 32},
    "gemma": {"head_dim": 16, "tie_word_embeddings": True},
    "gemma2": {
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "tie_word_embeddings": True,
        "attn_logit_softcapping": 0.5,
        "final_logit_softcapping": 2.0,
        **_SLIDES,
    },
    "gemma3_text": {"head_dim": 16, "query_pre_attn_scalar": 16, "tie_word_embeddings": True, **_SLIDES},
    "phi3": {"sliding_window": 8},
    "gpt2": {
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "n_inner": 96,
        "n_positions": 64,
        "tie_word_embeddings": True,
    },
    "smollm3": {"no_rope_layers": [1, 0]},
}


def config_of(name: str, **changes: Any) -> Any:
    from transformers import AutoConfig

    common = dict(_COMMON)
    if name == "gpt2":
        common = {key: value for key, value in common.items() if key.endswith("_token_id") or key == "vocab_size"}
    return AutoConfig.for_model(name, **{**common, **CONFIGS[name], **changes})


def random_model(name: str, folder: Path, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Any:
    """A random model saved to `folder`, and returned in float32. No weight is left at its default, norms included."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(config_of(name, **changes)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(parameter.mean() + 0.3 * noise if parameter.dim() == 1 else 0.15 * noise)
    model.to(dtype).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def random_windows(count: int = 6, tokens: int = 24, seed: int = 7, padded: bool = False) -> Windows:
    """Random ids; padded on the right to different lengths where asked."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (count, tokens), generator=generator)
    mask = None
    if padded:
        lengths = torch.randint(tokens // 3, tokens + 1, (count,), generator=generator)
        mask = (torch.arange(tokens) < lengths[:, None]).to(torch.int64)
        ids = ids * mask
    return Windows(ids, mask, {"digest": digest_of(ids, mask), "layout": "padded" if padded else "packed"})


def stage_context(
    source: Path,
    output: Path,
    windows: Windows | None = None,
    stored: torch.dtype = torch.float16,
    origin: Path | None = None,
    progress: Progress | None = None,
    compute: torch.dtype = torch.float32,
    after_block: Callable[[int], None] = lambda index: None,
    device: torch.device = CPU,
    chain: tuple[Checkpoint, ...] = (),
) -> StageContext:
    """What a stage works with, on small models. `origin`: what the run began with, if not `source`."""
    return StageContext(
        origin=Checkpoint(origin or source),
        source=Checkpoint(source),
        output=WorkingCheckpoint(output),
        windows=windows,
        device=device,
        compute=compute,
        stored=stored,
        tokens_at_once=48,
        seed=0,
        progress=progress or Quiet(),
        after_block=after_block,
        chain=chain,
    )


def apply_stage(
    stage: Stage, source: Path, output: Path, windows: Windows | None = None, **fields: Any
) -> tuple[Checkpoint, StageOutcome]:
    """The stage's finished checkpoint and what it says about it. `fields` are those of `stage_context`."""
    context = stage_context(source, output, windows, **fields)
    outcome = stage.apply(context)
    context.output.finish({"done": True})
    return Checkpoint(output), outcome


def our_logits(folder: Path, windows: Windows) -> Tensor:
    """Logits float32 (windows, tokens, vocabulary) by the walk, block by block."""
    from compress.checkpoints.skeleton import Skeleton
    from compress.evaluation.measure import walk_states

    checkpoint = Checkpoint(folder)
    states = walk_states(checkpoint, {"set": windows}, CPU, torch.float32, 48, Quiet(), "")["set"]
    with Skeleton(checkpoint.config, CPU, torch.float32).head(checkpoint) as head:
        return torch.stack([head.logits(window) for window in states])


@torch.no_grad()
def their_logits(model: Any, windows: Windows) -> Tensor:
    """The same by transformers."""
    return model(windows.ids, attention_mask=windows.mask, use_cache=False).logits.float()


@torch.no_grad()
def load_publicly(folder: Path) -> Any:
    """What any user's script would load, unpacked by one forward and then in float32 arithmetic."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    without_cpu_kernel(model)
    model(torch.ones(1, 4, dtype=torch.int64))
    return torch.nn.Module.float(model)


def load_of_8b(streams: float, replays: bool, refines: bool = True) -> WalkLoad:
    """A Llama-3.1-8B's shape on a GPU, 128 windows of 2048 tokens in batches of 16384, as in docs/benchmarks/gpu.md."""
    tokens = 128 * 2048
    return WalkLoad(
        parameters=8_030_261_248,
        block_parameters=218_112_000,
        widest_input=14336,
        rows_of_widest=14336,
        hidden=4096,
        calibration_tokens=tokens,
        streams=streams,
        held_tokens=16384 if replays else tokens,
        waiting_tokens=0,
        refines=refines,
        judges_shifts=False,
        evaluation_tokens=128,
        vocabulary=128256,
        compute_bytes=2,
    )
