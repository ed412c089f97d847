"""Compare compressed checkpoints with their source, token by token, with nothing but transformers.

    python judge.py --model DIR --evaluation NAME=FILE ... --candidate NAME=DIR ... --out FILE.json

Notation: p is the source's distribution of the next token, q a candidate's, both over the full vocabulary and in
float32. Per token: KL(p || q) in nats, and whether the most likely tokens agree. Perplexity is over the tokens a window
gives a label for (all but its first). All models are in memory together and see every window side by side, so that no
logits are ever stored: a float32 copy of the source per candidate, and the logits of one window at a time.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

Numbers = dict[str, list[torch.Tensor]]  # per window: "kl", "agree" `[tokens]`, "nll" `[tokens - 1]`


def named_path(text: str) -> tuple[str, Path]:
    """Parse NAME=PATH."""
    name, _, path = text.partition("=")
    if not name or not path:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PATH")
    return name, Path(path)


def log_probabilities(model: Any, window: torch.Tensor) -> torch.Tensor:
    """Return float32 log-probabilities `[tokens, vocabulary]` of `window`, int64 `[tokens]`."""
    return torch.log_softmax(model(window[None]).logits[0].float(), dim=-1)


def compare(p: torch.Tensor, q: torch.Tensor, window: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the per-token numbers for log-probabilities p (source) and q (candidate), both `[tokens, vocabulary]`.

    Worked example over two words: p = (.5, .5), q = (.8, .2): KL = .5 ln(.5/.8) + .5 ln(.5/.2) = 0.223 nats.
    """
    return {
        "kl": (p.exp() * (p - q)).sum(dim=-1, dtype=torch.float64),
        "agree": (p.argmax(dim=-1) == q.argmax(dim=-1)).double(),
        "nll": -q[:-1].gather(-1, window[1:, None]).squeeze(-1).double(),
    }


def summarise(numbers: Numbers) -> dict[str, Any]:
    """Return means and quantiles over all tokens, and the mean KL of every window for paired comparisons."""
    kl = torch.cat(numbers["kl"])
    return {
        "mean_kl": float(kl.mean()),
        "median_kl": float(kl.median()),
        "p99_kl": float(torch.quantile(kl, 0.99)),
        "top1_agreement": float(torch.cat(numbers["agree"]).mean()),
        "perplexity": math.exp(float(torch.cat(numbers["nll"]).mean())),
        "window_mean_kl": [float(window.mean()) for window in numbers["kl"]],
    }


def judge(models: dict[str, Any], windows: torch.Tensor) -> dict[str, Any]:
    """Return summaries by name; `models["source"]` is what the others are compared with. `windows`: `[n, tokens]`."""
    collected: dict[str, Numbers] = {name: {"kl": [], "agree": [], "nll": []} for name in models}
    for window in windows:
        source = log_probabilities(models["source"], window)
        for name, model in models.items():
            other = source if name == "source" else log_probabilities(model, window)
            for key, value in compare(source, other, window).items():
                collected[name][key].append(value)
    return {name: summarise(numbers) for name, numbers in collected.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--evaluation", type=named_path, action="append", required=True)
    parser.add_argument("--candidate", type=named_path, action="append", default=[])
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    folders = {"source": arguments.model, **dict(arguments.candidate)}
    models = {name: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for name, path in folders.items()}
    with torch.inference_mode():
        results = {name: judge(models, load_file(path)["input_ids"]) for name, path in arguments.evaluation}
    arguments.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
