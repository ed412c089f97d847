"""Which bits AutoRound's AutoScheme would give each linear, as overrides for a recipe of ours.

    python scripts/benchmarks/peers/autoscheme.py --model DIR --text FILE.jsonl --bits 4.0 --out OVERRIDES.yaml

It chooses among 2 to 6 bits in groups of 64 (its time grows with the number of options), at the same bits a weight with
scales; q, k, v and gate, up share a scheme. What it chose is then solved by our gptq: the choices are compared, not the
quantisers. Needs `pip install auto-round`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from pathlib import Path

import torch
import yaml
from auto_round import AutoRound, AutoScheme  # type: ignore[import-not-found]
from auto_round.schemes import QuantizationScheme  # type: ignore[import-not-found]
from transformers import AutoModelForCausalLM, AutoTokenizer

SHARED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
WIDTHS = ((2, 64), (3, 64), (4, 64), (5, 64), (6, 64))


def main() -> None:
    parser = argparse.ArgumentParser(description="AutoScheme's choice as overrides.")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--bits", type=float, required=True, help="a weight, with scales")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    options = [QuantizationScheme(bits=bits, group_size=size, sym=True, data_type="int") for bits, size in WIDTHS]
    scheme = AutoScheme(
        avg_bits=arguments.bits,
        options=options,
        shared_layers=SHARED,
        nsamples=arguments.samples,
        seqlen=arguments.tokens,
        dataset=str(arguments.text),
        device_map="cpu",
        low_cpu_mem_usage=False,
        low_gpu_mem_usage=False,
        enable_torch_compile=False,
    )
    started = time.perf_counter()
    rounder = AutoRound(
        model,
        AutoTokenizer.from_pretrained(arguments.model),
        scheme=scheme,
        iters=0,
        nsamples=arguments.samples,
        seqlen=arguments.tokens,
        dataset=str(arguments.text),
        device_map="cpu",
    )
    rounder.quantize()
    seconds = time.perf_counter() - started
    chosen = {
        name: (int(layer["bits"]), int(layer["group_size"]))
        for name, layer in rounder.layer_config.items()
        if name.startswith("model.layers.")
    }
    overrides = [{"match": name, "bits": bits, "group_size": size} for name, (bits, size) in sorted(chosen.items())]
    arguments.out.write_text(yaml.safe_dump(overrides, sort_keys=False))
    kinds = Counter((name.rsplit(".", 1)[1], *layer) for name, layer in chosen.items())
    print(json.dumps({"seconds": seconds, "linears": len(chosen), "chosen": [[*key, n] for key, n in kinds.items()]}))


if __name__ == "__main__":
    main()
