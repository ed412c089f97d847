"""Write a Llama with random weights, tensor by tensor, never holding more than one: what memory is measured with.

    python scripts/benchmarks/random_model.py OUT_DIR --tokenizer FOLDER [--blocks 24] [--hidden 2048] [--inner 8192]
        [--heads 32] [--kv-heads 8] [--vocabulary 32000] [--tied] [--shard-bytes 1000000000] [--seed 0] [--device cpu]

Writes bfloat16 safetensors in shards with an index, config.json, and copies of FOLDER's tokenizer files, whose ids must
be below --vocabulary. Weights are normal with the variance 1 / (input width), norms are 1. The same arguments give the
same bytes; another device gives others. The defaults have 1.59 billion parameters in 3.2 GB (1.52 billion with --tied);
24 blocks of 60.8 million each.
"""

from __future__ import annotations

import argparse
import math
import shutil
import zlib
from pathlib import Path

import torch
from torch import Tensor

from compress.checkpoints.folder import companion_files
from compress.checkpoints.stream import Entry, write_sharded
from compress.files import write_json


def config_of(arguments: argparse.Namespace) -> dict[str, object]:
    """config.json of the model."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": arguments.vocabulary,
        "hidden_size": arguments.hidden,
        "intermediate_size": arguments.inner,
        "num_hidden_layers": arguments.blocks,
        "num_attention_heads": arguments.heads,
        "num_key_value_heads": arguments.kv_heads,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": arguments.tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def shapes_of(arguments: argparse.Namespace) -> dict[str, tuple[int, ...]]:
    """Shape of every stored tensor, in the order they are written."""
    hidden, inner = arguments.hidden, arguments.inner
    keys = hidden // arguments.heads * arguments.kv_heads
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (arguments.vocabulary, hidden)}
    for block in range(arguments.blocks):
        within = {
            "input_layernorm": (hidden,),
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "post_attention_layernorm": (hidden,),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }
        shapes |= {f"model.layers.{block}.{name}.weight": shape for name, shape in within.items()}
    shapes["model.norm.weight"] = (hidden,)
    if not arguments.tied:
        shapes["lm_head.weight"] = (arguments.vocabulary, hidden)
    return shapes


def values(name: str, shape: tuple[int, ...], seed: int, device: str = "cpu") -> Tensor:
    """One tensor, bfloat16, from a generator of its own."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    generator = torch.Generator(device).manual_seed(seed + zlib.crc32(name.encode()))
    empty = torch.empty(shape, dtype=torch.bfloat16, device=device)
    return empty.normal_(std=1 / math.sqrt(shape[1]), generator=generator)


def write_model(arguments: argparse.Namespace) -> tuple[int, int]:
    """Write the model that the command line's arguments describe. Returns parameters and bytes."""
    arguments.folder.mkdir(parents=True, exist_ok=True)
    shapes = shapes_of(arguments)
    entries = [
        Entry(
            name,
            torch.bfloat16,
            shape,
            lambda name=name, shape=shape: values(name, shape, arguments.seed, arguments.device),  # type: ignore[misc]
        )
        for name, shape in shapes.items()
    ]
    total = write_sharded(arguments.folder, entries, arguments.shard_bytes)
    write_json(arguments.folder / "config.json", config_of(arguments))
    for path in companion_files(arguments.tokenizer):
        if path.name.startswith(("tokenizer", "special_tokens")):
            shutil.copyfile(path, arguments.folder / path.name)
    return sum(math.prod(shape) for shape in shapes.values()), total


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("folder", type=Path)
    made.add_argument("--tokenizer", type=Path, required=True)
    for name, default in (
        ("blocks", 24),
        ("hidden", 2048),
        ("inner", 8192),
        ("heads", 32),
        ("kv-heads", 8),
        ("vocabulary", 32000),
        ("shard-bytes", 10**9),
        ("seed", 0),
    ):
        made.add_argument(f"--{name}", type=int, default=default)
    made.add_argument("--tied", action="store_true")
    made.add_argument("--device", default="cpu")
    return made


def main() -> None:
    arguments = parser().parse_args()
    parameters, total = write_model(arguments)
    print(f"{parameters:,} parameters, {total:,} bytes in {arguments.folder}")


if __name__ == "__main__":
    main()
