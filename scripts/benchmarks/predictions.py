"""How well `mixed_precision` predicts the divergence of mixtures it has not measured, and what `sensitivity` takes.

    python scripts/benchmarks/predictions.py RECIPE.yaml --out RESULTS.json [--plans 30] [--low 3.25] [--high 6]

RECIPE begins with a mixed_precision stage. Two sets of random mixtures are put together and measured on its tuning
windows: at the recipe's budget, and at budgets drawn between --low and --high effective bits. A mixture is the
cheapest within its bytes when each unit's cost is disturbed by a factor exp(N(0, 1)). Predictions are those of the
stage: factors fitted to its own probes, which are none of these. Printed: Spearman's rank correlation, the spread of
predicted over measured, R^2 of logarithms. --gptq also applies `gptq` as the recipe has it in 4 bits, for
`sensitivity`'s time beside it, both with an empty cache.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

from compress.allocation.fit import by_kind
from compress.checkpoints.working import WorkingCheckpoint
from compress.console import StageProgress
from compress.memory.measure import PeakSampler, large_tensors_from_system
from compress.recipe import Recipe, load_recipe
from compress.stages import Gptq, MixedPrecision
from compress.stages.base import StageContext
from compress.stages.choices import Choice, Choices
from compress.stages.choosing import SPREAD_OF_PROBES, UNIFORM_MEASURED, WithinBudget
from compress.stages.presets import written_out
from compress.steps.environment import choose_machine, provenance, versions
from compress.steps.fold import fold
from compress.steps.source import open_source
from compress.steps.texts import read_texts

SEED = 77


def sums_of(choices: Choices, plan: Choice) -> dict[str, float]:
    """Its costs before anything is fitted, by kind of unit."""
    return by_kind(
        [unit.family for unit in choices.units], [row[k] for row, k in zip(choices.costs, plan, strict=True)]
    )


def judged(choices: Choices, factors: dict[str, float], plans: list[Choice]) -> dict[str, Any]:
    """Predicted and measured divergence of some mixtures, and how they agree."""
    measured, predicted, costs = [], [], []
    for number, plan in enumerate(plans):
        measured.append(choices.judge(plan).kl)
        sums = sums_of(choices, plan)
        costs.append(sums)
        predicted.append(sum(factors[kind] * cost for kind, cost in sums.items()))
        print(f"{number + 1}: {choices.effective_bits(plan):.3f} bits, {measured[-1]:.4f}", flush=True)
    logs = np.log(predicted) - np.log(measured)
    total = np.square(np.log(measured) - np.log(measured).mean()).sum()
    return {
        "bits": [choices.effective_bits(plan) for plan in plans],
        "predicted": predicted,
        "costs_by_kind": costs,
        "measured": measured,
        "rank_correlation": float(stats.spearmanr(predicted, measured).statistic),
        "bias": float(logs.mean()),
        "spread": float(logs.std()),
        "r2": float(1 - np.square(logs).sum() / total),
    }


def run_of(recipe: Recipe, beside_gptq: bool, work: Path) -> tuple[WithinBudget, dict[str, float]]:
    """What chooses within the recipe's budget, its candidates solved; seconds by kind of stage. `work` is emptied: what
    a run before measured there may have been of other text."""
    progress = StageProgress()
    source = open_source(recipe.model, progress)
    machine = choose_machine(recipe.model.device, source.checkpoint.config)
    texts = read_texts(recipe, source, machine, progress)
    sensitivity, stage, *after = written_out(recipe.stages)
    assert isinstance(stage, MixedPrecision), "the recipe has to begin with mixed_precision"
    applied = [sensitivity]
    if beside_gptq:
        own = next(each for each in after if isinstance(each, Gptq))
        applied = [own.model_copy(update={"bits": 4}), sensitivity]
    seconds: dict[str, float] = {}
    with PeakSampler() as sampler:
        for each in applied:
            (folded,) = fold(
                *((each,), source.checkpoint, source.digest, texts.calibration, recipe.seed, machine, torch.float16),
                *(progress, sampler),
            )
            seconds[each.model_dump()["kind"]] = folded.record["seconds"]
    shutil.rmtree(work, ignore_errors=True)
    context = StageContext(
        origin=source.checkpoint,
        source=folded.checkpoint,
        output=WorkingCheckpoint(work),
        windows=texts.calibration,
        device=machine.device,
        compute=machine.compute,
        stored=torch.float16,
        tokens_at_once=machine.tokens_at_once,
        seed=recipe.seed,
        progress=progress,
    )
    return WithinBudget(stage, context), seconds


def compared(run: WithinBudget, plans: int, low: float, high: float) -> dict[str, Any]:
    """Costs fitted as a run does, and random mixtures predicted by them and measured."""
    stage, choices, limit = run.stage, run.choices, run.limit
    first = tuple(stage.solved(choices.costs, choices.bytes, choices.sizes))
    probes = [run.disturbed(choices.costs, SPREAD_OF_PROBES, limit) for _ in range(stage.probes)]
    probed = [*run.rivals()[-UNIFORM_MEASURED:], first, *probes]
    fitted = choices.fit(probed)
    run.generator = generator = np.random.default_rng(SEED)

    def drawn(most: int) -> Choice:
        return run.disturbed(choices.costs, SPREAD_OF_PROBES, most)

    near = [drawn(limit) for _ in range(plans)]
    least = 8 * sum(min(row) for row in choices.bytes) / choices.sizes.weights
    if low < least:
        print(f"--low is {least:.3f}, the bits of the smallest mixture", flush=True)
    budgets = generator.uniform(max(low, 1.001 * least), high, plans)
    anywhere = [drawn(int(bits * choices.sizes.weights / 8)) for bits in budgets]
    return {
        "factors": fitted.factors,
        "r2_of_fit": fitted.r2,
        "fitted_to": {
            "costs_by_kind": [sums_of(choices, each) for each in probed],
            "measured": [choices.judge(each).kl for each in probed],
        },
        "at the budget": judged(choices, fitted.factors, near),
        "at random budgets": judged(choices, fitted.factors, anywhere),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--plans", type=int, default=30)
    parser.add_argument("--low", type=float, default=3.25)
    parser.add_argument("--high", type=float, default=6.0)
    parser.add_argument("--gptq", action="store_true")
    arguments = parser.parse_args()
    large_tensors_from_system()
    recipe = load_recipe(arguments.recipe)
    run, seconds = run_of(recipe, arguments.gptq, arguments.out.resolve().with_suffix(".work"))
    found = compared(run, arguments.plans, arguments.low, arguments.high)
    found |= {"seconds": seconds, "versions": versions(), "machine": provenance()["processor"]}
    arguments.out.write_text(json.dumps(found, indent=2) + "\n")
    for name in ("at the budget", "at random budgets"):
        each = found[name]
        off = f"off by {100 * each['bias']:+.1f} % on average, spread {100 * each['spread']:.1f} %"
        print(f"{name}: rank {each['rank_correlation']:.3f}, {off}, R2 {each['r2']:.3f}")
    print({kind: round(each) for kind, each in seconds.items()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
