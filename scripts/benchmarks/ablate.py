"""Compress one model with several variants of a stage list and compare their divergence on every evaluation set.

    python scripts/benchmarks/ablate.py RECIPE.yaml VARIANTS.yaml --out RESULTS.json [--only NAME,NAME]

VARIANTS maps a name to a list of stages, as a recipe has them. Model, calibration and evaluation are the recipe's. A
variant whose stages were applied before is taken from the cache, so adding one costs one. Results are added to
--out, and the table is printed: mean KL in nats with the perplexity ratio to the source, and seconds by part.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
import yaml

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

sys.path.insert(0, str(Path(__file__).resolve().parent / "peers"))

from report import table


def measure(recipe: Recipe, variants: dict[str, list[dict[str, Any]]], out: Path) -> dict[str, Any]:
    """Apply and measure every variant; `out` is written after each."""
    progress = StageProgress()
    source = open_source(recipe.model, progress)
    machine = choose_machine(recipe.model.device, source.checkpoint.config)
    texts = read_texts(recipe, source, machine, progress)
    baseline = measure_source(recipe, source, texts, machine, progress)
    results: dict[str, Any] = json.loads(out.read_text()) if out.is_file() else {}
    for name, stages in variants.items():
        varied = Recipe.model_validate({**recipe.model_dump(mode="json", by_alias=True), "stages": stages})
        applied = written_out(varied.stages)
        with PeakSampler() as sampler:
            folded = fold(
                applied,
                source.checkpoint,
                source.digest,
                texts.calibration,
                recipe.seed,
                machine,
                torch.float16,
                progress,
                sampler,
            )
        last = folded[-1].checkpoint
        states = walk_states(
            last, texts.evaluation, machine.device, machine.compute, machine.tokens_at_once, progress, name
        )
        pair = (source.checkpoint, baseline.states), (last, states)
        scores = score(*pair, texts.evaluation, machine.device, machine.compute, progress)
        before, after = summarise(recipe.on_text, scores)
        results[name] = {
            "stages": stages,
            "values": after.values,
            "source": before.values,
            "intervals": after.intervals,
            "seconds": {
                f"{index} {each.record['kind']}": each.record["seconds_by_part"] for index, each in enumerate(folded)
            },
            "recipe": recipe.digest(),
            "events": sorted({event.kind for each in folded for event in each.events}),
            "peak_host_bytes": max((each.record["peak_host_bytes"] or 0) for each in folded),
            "versions": versions(),
            "machine": provenance()["processor"],
        }
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(results, indent=2) + "\n")
        print(row(name, results[name]), flush=True)
    return results


def row(name: str, result: dict[str, Any]) -> list[str]:
    """One line of the table."""
    values, source = result["values"], result["source"]
    cells = [name]
    for key in sorted(key for key in values if key.endswith(".mean_kl")):
        text = key.split(".")[1]
        ratio = values[f"perplexity.{text}"] / source[f"perplexity.{text}"]
        cells.append(f"{values[key]:.4f} ({ratio:.3f}x)")
    parts: dict[str, float] = {}
    for seconds in result["seconds"].values():
        for part, spent in seconds.items():
            parts[part] = parts.get(part, 0) + spent
    return [*cells, ", ".join(f"{part} {spent:.0f}" for part, spent in parts.items())]


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare variants of a stage list.")
    parser.add_argument("recipe", type=Path)
    parser.add_argument("variants", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", help="comma-separated names of variants")
    arguments = parser.parse_args()
    large_tensors_from_system()
    variants = yaml.safe_load(arguments.variants.read_text())
    if arguments.only:
        variants = {name: variants[name] for name in arguments.only.split(",")}
    results = measure(load_recipe(arguments.recipe), variants, arguments.out)
    sets = sorted({key.split(".")[1] for result in results.values() for key in result["values"] if "mean_kl" in key})
    head = ["", *(f"{name}: mean KL (perplexity)" for name in sets), "seconds"]
    print(table(head, [row(name, result) for name, result in results.items()]))


if __name__ == "__main__":
    main()
