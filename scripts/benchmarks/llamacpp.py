"""What llama.cpp's own quantiser makes of a recipe's model, judged as our files are: bytes, divergence, perplexity.

    python scripts/benchmarks/llamacpp.py RECIPE.yaml --ftype Q4_K_M --ftype Q3_K_M --out RESULTS.json

For each file type twice, with an importance matrix (mean squares of inputs over the recipe's calibration text) and
without. llama.cpp is that of `make loaders` (.loaders/llamacpp). Values are those that transformers' reader gives. With
--ours VARIANTS.yaml, lists of stages by name as in ablate.py, ours are exported as .gguf and judged beside it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor, nn

from compress.calibration.windows import Windows
from compress.checkpoints.export import export
from compress.checkpoints.formats.gguf import FILE, tensor_bytes
from compress.checkpoints.formats.gguf_names import Names, completed
from compress.checkpoints.from_gguf import convert
from compress.checkpoints.reader import Checkpoint
from compress.console import StageProgress
from compress.evaluation.measure import score, summarise, walk_states
from compress.memory.measure import PeakSampler, large_tensors_from_system
from compress.recipe import Recipe, load_recipe
from compress.stages.presets import written_out
from compress.steps.environment import choose_machine, provenance, versions
from compress.steps.fold import fold
from compress.steps.judging import measure_source
from compress.steps.source import open_source
from compress.steps.texts import read_texts

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".loaders" / "llamacpp" / "bin" / "python"
WORKER = Path(__file__).resolve().parent / "peers" / "llamacpp_quantise.py"
STORED = torch.float16


class Bench:
    """A recipe's source, its texts, and what is known of the source on them."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.progress = recipe, StageProgress()
        self.source = open_source(recipe.model, self.progress)
        self.machine = choose_machine(recipe.model.device, self.source.checkpoint.config)
        self.texts = read_texts(recipe, self.source, self.machine, self.progress)
        self.baseline = measure_source(recipe, self.source, self.texts, self.machine, self.progress)

    def judge(self, path: Path, scratch: Path) -> dict[str, Any]:
        """Bytes of a .gguf file's tensors, and its measures as transformers reads it."""
        folder = scratch / "read"
        folder.mkdir()
        kinds = convert(path, folder, self.source.checkpoint.folder)
        read, machine = Checkpoint(folder), self.machine
        where = machine.device, machine.compute
        states = walk_states(read, self.texts.evaluation, *where, machine.tokens_at_once, self.progress, path.name)
        pair = (self.source.checkpoint, self.baseline.states), (read, states)
        before, after = summarise(self.recipe.on_text, score(*pair, self.texts.evaluation, *where, self.progress))
        return {"bytes": tensor_bytes(path), "types": kinds, "values": after.values, "source": before.values}

    def ours(self, stages: list[dict[str, Any]], scratch: Path) -> dict[str, Any]:
        """The same of what stages make."""
        varied = Recipe.model_validate({**self.recipe.model_dump(mode="json", by_alias=True), "stages": stages})
        applied, source = written_out(varied.stages), self.source
        with PeakSampler() as sampler:
            fixed = source.checkpoint, source.digest, self.texts.calibration, self.recipe.seed, self.machine, STORED
            folded = fold(applied, *fixed, self.progress, sampler)
        export(folded[-1].checkpoint, scratch / "export", "gguf", STORED, 1 << 40)
        return {"stages": stages, **self.judge(scratch / "export" / FILE, scratch)}

    def peers(self, ftype: str, dense: Path, imatrix: Path | None, scratch: Path) -> dict[str, Any]:
        """The same of what llama.cpp makes of the source in 16 bits."""
        out, started = scratch / f"{ftype}.gguf", time.perf_counter()
        command = [PYTHON, WORKER, dense, out, ftype, *([imatrix] if imatrix else [])]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{ftype}: llama.cpp ended with {done.returncode}: {done.stderr[-2000:]}")
        return {"seconds": time.perf_counter() - started, **self.judge(out, scratch)}


@torch.no_grad()
def importance(checkpoint: Checkpoint, windows: Windows) -> dict[str, Tensor]:
    """Mean square of the input columns of every linear, float32 by the tensor's name in a .gguf file."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32).eval()
    arch, names = checkpoint.architecture, Names(completed(checkpoint.config))
    sums: dict[str, Tensor] = {}

    def watch(name: str, linear: nn.Module) -> None:
        def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            del module
            square = inputs[0].flatten(0, -2).square().sum(0, dtype=torch.float64)
            sums[name] = sums[name] + square if name in sums else square

        linear.register_forward_pre_hook(add)

    for index in range(checkpoint.block_count):
        for leaf in arch.linears:
            module = f"{arch.block_name(index)}.{leaf}"
            watch(names.of(f"{module}.weight"), model.get_submodule(module))
    for ids in windows.ids:
        model.base_model(ids.unsqueeze(0), use_cache=False)
    return {name: (total / windows.ids.numel()).float() for name, total in sums.items()}


def line(name: str, result: dict[str, Any]) -> str:
    values, source = result["values"], result["source"]
    cells = []
    for key in sorted(key for key in values if key.endswith(".mean_kl")):
        text = key.split(".")[1]
        ratio = values[f"perplexity.{text}"] / source[f"perplexity.{text}"]
        cells.append(f"{text} {values[key]:.4f} ({ratio:.3f}x)")
    return f"{name}: {result['bytes'] / 1e6:.2f} MB, {', '.join(cells)}, {result['types']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--ftype", action="append", default=[])
    parser.add_argument("--ours", type=Path)
    parser.add_argument("--only", help="comma-separated names of ours")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    large_tensors_from_system()
    bench = Bench(load_recipe(arguments.recipe))
    results: dict[str, Any] = json.loads(arguments.out.read_text()) if arguments.out.is_file() else {}

    def keep(name: str, result: dict[str, Any]) -> None:
        results[name] = {**result, "versions": versions(), "machine": provenance()["processor"]}
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")
        print(line(name, result), flush=True)

    with tempfile.TemporaryDirectory() as place:
        if arguments.ftype:
            assert bench.texts.calibration is not None
            matrix = Path(place) / "imatrix.safetensors"
            save_file(importance(bench.source.checkpoint, bench.texts.calibration), matrix)
            export(bench.source.checkpoint, Path(place) / "dense", "gguf", STORED, 1 << 40)
        for ftype in arguments.ftype:
            for label, weights in (("imatrix", matrix), ("plain", None)):
                with tempfile.TemporaryDirectory() as scratch:
                    dense = Path(place) / "dense" / FILE
                    keep(f"llama.cpp {ftype} {label}", bench.peers(ftype, dense, weights, Path(scratch)))
    variants = yaml.safe_load(arguments.ours.read_text()) if arguments.ours else {}
    for name in arguments.only.split(",") if arguments.only else variants:
        with tempfile.TemporaryDirectory() as scratch:
            keep(name, bench.ours(variants[name], Path(scratch)))


if __name__ == "__main__":
    sys.exit(main())
