"""A model pruned by Torch-Pruning to a checkpoint folder, to be judged by `compress eval` beside ours.

    python scripts/benchmarks/peers/torchpruning_worker.py --model DIR --ratio 0.125 --out DIR
        [--importance magnitude|taylor] [--text FILE.txt]

MLP channels only, the same number in every block, so that the same parameters go as with our `parts: [mlp]`: the parts
are not compared, but what is chosen of them, and what is done for the rest. `taylor` takes gradients of the loss on the
text's windows. Needs `pip install torch-pruning`.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
import torch_pruning as tp  # type: ignore[import-not-found]
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description="Torch-Pruning on the MLP channels of a model.")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--ratio", type=float, required=True, help="of the parameters of all blocks")
    parser.add_argument("--importance", choices=("magnitude", "taylor"), default="magnitude")
    parser.add_argument("--text", type=Path, help="for taylor: plain text")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model.config.use_cache = False
    layers = model.model.layers
    block = sum(parameter.numel() for parameter in layers[0].parameters())
    width, hidden = model.config.intermediate_size, model.config.hidden_size
    keep = width - round(arguments.ratio * block / (3 * hidden) / 128) * 128
    started = time.perf_counter()
    example = torch.tensor([tokenizer("The quick brown fox jumps over the lazy dog.")["input_ids"]])
    share = {layer.mlp.gate_proj: 1 - keep / width for layer in layers}
    share |= {layer.mlp.up_proj: 1 - keep / width for layer in layers}
    ignored = [
        module for layer in layers for module in layer.self_attn.children() if isinstance(module, torch.nn.Linear)
    ]
    importance = (
        tp.importance.GroupTaylorImportance()
        if arguments.importance == "taylor"
        else tp.importance.GroupMagnitudeImportance()
    )
    pruner = tp.pruner.BasePruner(
        model,
        example,
        importance=importance,
        pruning_ratio=0.0,
        pruning_ratio_dict=share,
        ignored_layers=[model.lm_head, model.model.embed_tokens, *ignored],
        root_module_types=[torch.nn.Linear],
        global_pruning=False,
        forward_fn=lambda net, ids: net(input_ids=ids, use_cache=False).logits,
        output_transform=lambda logits: logits.sum(1),  # a scalar has no channels, which some versions ask for
    )
    if arguments.importance == "taylor":
        _gradients(model, tokenizer, arguments)
    pruner.step()
    model.zero_grad()
    model.config.intermediate_size = keep
    widths = {layer.mlp.down_proj.in_features for layer in layers}
    assert widths == {keep}, widths
    print(f"{width} -> {keep} channels, {time.perf_counter() - started:.0f} s")
    model.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)


def _gradients(model: torch.nn.Module, tokenizer: object, arguments: argparse.Namespace) -> None:
    ids = tokenizer(arguments.text.read_text(encoding="utf-8"))["input_ids"]  # type: ignore[operator]
    for start in range(0, arguments.windows * arguments.tokens, arguments.tokens):
        window = torch.tensor([ids[start : start + arguments.tokens]])
        model(input_ids=window, labels=window).loss.backward()


if __name__ == "__main__":
    main()
