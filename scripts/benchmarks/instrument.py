"""How often is the non-inferiority gate wrong? Windows of a real model, and simulated answers.

    python scripts/get_texts.py .cache/texts brown-news
    python scripts/benchmarks/instrument.py --model DIR --out .cache/bench/instrument.json

A/A: the source against itself, walked with another batch size; it must not fail. Degraded: the source against itself
with normal noise on its final hidden states, at several strengths; the true loss is that of all windows together.
Each is judged `--rounds` times on `--windows` windows drawn with replacement from all. Answers: items that change sides
with a known probability. With `--compressed FOLDER`, an export of the same model: how often the 95 % upper bound of
its mean KL falls short, by Student's t and by bootstrap of the windows (scipy's percentile and BCa), and how much
windows differ. With looks, a gate may ask for twice the windows, twice.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
from collections import Counter
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

from compress.calibration.window_specs import WindowSpec
from compress.calibration.windows import Windows, build_windows
from compress.checkpoints.reader import Checkpoint
from compress.evaluation.looks import alpha_at_each
from compress.evaluation.measure import States, score, summarise, walk_states
from compress.evaluation.paired import Paired
from compress.evaluation.specs import Divergence, Perplexity
from compress.evaluation.statistics import mean_interval
from compress.events import Quiet
from compress.gates import Facts, NonInferiorityGate
from compress.gates.base import Look
from compress.steps.source import load_tokenizer

CPU = torch.device("cpu")
MEASURE, KL, ACCURACY = "perplexity.text", "divergence.text.mean_kl", "task.simulated.accuracy"
NOISES = (0.02, 0.03, 0.05, 0.06, 0.07, 0.1)


def walked(checkpoint: Checkpoint, windows: Windows, batch_tokens: int) -> States:
    return walk_states(checkpoint, {"text": windows}, CPU, torch.float32, batch_tokens, Quiet(), "walk")


def paired(checkpoint: Checkpoint, windows: Windows, source: States, other: States) -> Paired:
    """Window means of the losses of two sets of final states."""
    scores = score((checkpoint, source), (checkpoint, other), {"text": windows}, CPU, torch.float32, Quiet())
    spec = Perplexity(data="brown-news", set="text", windows=len(windows.ids))
    return summarise((spec,), scores)[1].paired[MEASURE]


def verdicts(
    judge: Callable[[np.random.Generator], Paired], measure: str, margin: float, rounds: int
) -> dict[str, float]:
    """Share of each verdict over `rounds` draws."""
    generator, gate = np.random.default_rng(0), NonInferiorityGate(measure=measure, margin=margin)
    drawn = (Facts(source={}, compressed={}, paired={measure: judge(generator)}) for _ in range(rounds))
    counts = Counter(gate.judge(facts).verdict for facts in drawn)
    return {verdict: counts[verdict] / rounds for verdict in ("passed", "inconclusive", "failed")}


def resampled(pool: Paired, size: int) -> Callable[[np.random.Generator], Paired]:
    def draw(generator: np.random.Generator) -> Paired:
        rows = generator.integers(0, len(pool), size)
        return Paired(pool.unit, tuple(map(str, rows)), pool.source[rows], pool.compressed[rows], pool.weights[rows])

    return draw


def with_looks(pool: Paired, sizes: tuple[int, ...], margin: float, rounds: int) -> dict[str, float]:
    """Share of each verdict where the gate asks for more while it cannot decide."""
    generator, gate = np.random.default_rng(0), NonInferiorityGate(measure=MEASURE, margin=margin)
    counts: Counter[str] = Counter()
    for _ in range(rounds):
        drawn = resampled(pool, sizes[-1])(generator)
        for number, size in enumerate(sizes, start=1):
            seen = Paired(
                "windows", drawn.ids[:size], drawn.source[:size], drawn.compressed[:size], drawn.weights[:size]
            )
            facts = Facts(source={}, compressed={}, paired={MEASURE: seen}, looks={MEASURE: Look(number, sizes)})
            verdict = gate.judge(facts).verdict
            if verdict != "inconclusive":
                break
        counts[verdict] += 1
    return {verdict: counts[verdict] / rounds for verdict in ("passed", "inconclusive", "failed")}


def bounds_of_kl(checkpoint: Checkpoint, compressed: Path, windows: Windows, source: States, rounds: int) -> list[Any]:
    """How often an upper bound of mean KL lies below the mean of all windows; 5 % is wanted."""
    other = Checkpoint(compressed)
    scores = score(
        (checkpoint, source),
        (other, walked(other, windows, 1024)),
        {"text": windows},
        CPU,
        torch.float32,
        Quiet(),
    )
    spec = Divergence(data="brown-news", set="text", windows=len(windows.ids))
    pool = summarise((spec,), scores)[1].paired[KL].compressed
    generator, rows = np.random.default_rng(0), []
    for size in (8, 16, 24, 48):
        short: Counter[str] = Counter()
        for _ in range(rounds):
            drawn = generator.choice(pool, size)
            short["t"] += mean_interval(torch.from_numpy(drawn), torch.ones(size), 0.9)[1][1] < pool.mean()
            for method in ("percentile", "BCa"):
                found = stats.bootstrap(
                    (drawn,), np.mean, confidence_level=0.9, n_resamples=999, method=method, rng=generator
                )
                short[method] += found.confidence_interval.high < pool.mean()
        rows.append({"windows": size, **{name: short[name] / rounds for name in ("t", "percentile", "BCa")}})
        print(rows[-1], flush=True)
    rows.append({"mean_kl": pool.mean(), "spread": pool.std(ddof=1) / pool.mean(), "skew": float(stats.skew(pool))})
    print(rows[-1], flush=True)
    return rows


def answers(items: int, discordance: float, loss: float) -> Callable[[np.random.Generator], Paired]:
    """0/1 answers of `items` items, of which `discordance` change sides and `loss` more are lost than won."""

    def draw(generator: np.random.Generator) -> Paired:
        lost, won, kept = generator.multinomial(
            items, [(discordance + loss) / 2, (discordance - loss) / 2, 1 - discordance]
        )
        source = np.repeat([1.0, 0.0, 1.0], [lost, won, kept])
        compressed = np.repeat([0.0, 1.0, 1.0], [lost, won, kept])
        return Paired("items", tuple(map(str, range(items))), source, compressed, np.ones(items))

    return draw


def on_windows(arguments: argparse.Namespace) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[Any]]:
    checkpoint = Checkpoint(arguments.model)
    spec = WindowSpec(data="brown-news", windows=arguments.pool, window_tokens=arguments.window_tokens)
    windows = build_windows(spec, Path.cwd(), load_tokenizer(arguments.model), 0, "instrument")
    source = walked(checkpoint, windows, 1024)
    others = {"A/A, another batch size": walked(checkpoint, windows, 4 * arguments.window_tokens - 1)}
    generator = torch.Generator().manual_seed(0)
    states = source["text"]
    for noise in NOISES:
        shift = torch.randn(states.shape, generator=generator) * states.std() * noise
        others[f"noise {noise:g}"] = {"text": states + shift}
    rows, looks = [], []
    sizes = (arguments.windows // 2, arguments.windows, 2 * arguments.windows)
    for name, other in others.items():
        pool = paired(checkpoint, windows, source, other)
        loss = math.expm1(float(np.average(pool.compressed - pool.source, weights=pool.weights)))
        shares = verdicts(resampled(pool, arguments.windows), MEASURE, arguments.margin, arguments.rounds)
        rows.append({"what": name, "true_loss": loss, "margin": arguments.margin, **shares})
        print(rows[-1], flush=True)
        shares = with_looks(pool, sizes, arguments.margin, arguments.rounds)
        looks.append({"what": name, "windows": sizes, "alpha": alpha_at_each(0.05, sizes), "true_loss": loss, **shares})
        print(looks[-1], flush=True)
    compressed, rounds = arguments.compressed, 10 * arguments.rounds
    bounds = bounds_of_kl(checkpoint, compressed, windows, source, rounds) if compressed else []
    return rows, looks, bounds


def on_answers(rounds: int, margin: float) -> list[dict[str, Any]]:
    rows = []
    for items in (200, 1000, 4000):
        for discordance in (0.05, 0.1):
            for loss in (0.0, margin, 2 * margin):
                shares = verdicts(answers(items, discordance, loss), ACCURACY, margin, rounds)
                rows.append({"items": items, "discordance": discordance, "true_loss": loss, "margin": margin, **shares})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure how often the non-inferiority gate errs.")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--compressed", type=Path, help="an export of the same model")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pool", type=int, default=96, help="windows walked")
    parser.add_argument("--windows", type=int, default=24, help="windows drawn for one judgement")
    parser.add_argument("--window-tokens", type=int, default=256)
    parser.add_argument("--margin", type=float, default=0.02, help="for perplexity, a ratio")
    parser.add_argument("--rounds", type=int, default=200)
    arguments = parser.parse_args()
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "scipy", "numpy")}
    windows, looks, bounds = on_windows(arguments)
    result = {
        "machine": f"{os.cpu_count()} x {platform.machine()}",
        "versions": versions,
        "windows": windows,
        "looks": looks,
        "bounds_of_kl": bounds,
        "answers": on_answers(arguments.rounds, 0.02),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    for row in result["answers"]:
        print(row)


if __name__ == "__main__":
    main()
