"""Perplexity and KL divergence of checkpoints on held-out windows.

Both models walk the same windows block by block; what is kept is their final hidden states (float32, a few hundred
megabytes at most), never logits. Logits are formed a few hundred tokens at a time for both models and reduced to four
numbers a token: both negative log-likelihoods, the KL divergence, and whether the likeliest tokens agree. A file of
16-bit logits would put a floor of 5e-4 nats under the KL; recomputing them does not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from compress.calibration.walk import final_hidden_states
from compress.calibration.windows import Windows
from compress.checkpoints.reader import Checkpoint
from compress.checkpoints.skeleton import Head, Skeleton
from compress.evaluation.paired import Paired
from compress.evaluation.specs import OnText
from compress.evaluation.statistics import Interval, mean_interval
from compress.events import Progress
from compress.files import atomic_path

TOKENS_AT_ONCE = 64
"""Tokens whose logits are formed at a time: with a vocabulary of 128k, 32 MiB a model in float32."""


@dataclass(frozen=True)
class Measured:
    """Flat measurements of one model. `ratio_intervals` are of the ratio to the source, paired by window."""

    values: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, Interval] = field(default_factory=dict)
    ratio_intervals: dict[str, Interval] = field(default_factory=dict)
    paired: dict[str, Paired] = field(default_factory=dict)
    """By measurement, what it was computed from; kept with the compressed model's."""

    def over(self, earlier: Measured) -> Measured:
        """These measurements, and everything of `earlier` that was not measured again."""
        return Measured(
            {**earlier.values, **self.values},
            {**earlier.intervals, **self.intervals},
            {**earlier.ratio_intervals, **self.ratio_intervals},
            {**earlier.paired, **self.paired},
        )


HEALTH_WINDOWS = 4
"""Windows of each set that the health check looks at; enough to tell a broken model from a healthy one."""

States = dict[str, Tensor]
"""Final hidden states by set name: (windows, tokens, hidden) float32."""


def walk_states(
    checkpoint: Checkpoint,
    sets: dict[str, Windows],
    device: torch.device,
    dtype: torch.dtype,
    tokens_at_once: int,
    progress: Progress,
    label: str,
    as_loaded: bool = False,
) -> States:
    """Final hidden states of a checkpoint on every set, in one walk over its blocks. `as_loaded`: linears with
    integer inputs compute as transformers does, and not as the kernels that serve them."""
    skeleton = Skeleton(checkpoint.config, device, dtype)
    skeleton.as_loaded = as_loaded
    batches, owners = [], []
    for name, windows in sets.items():
        for batch in windows.batches(tokens_at_once):
            batches.append(batch)
            owners.append(name)
    parts: dict[str, list[Tensor]] = {name: [] for name in sets}
    states = final_hidden_states(skeleton, checkpoint, batches, progress, label)
    for owner, hidden in zip(owners, states, strict=True):
        parts[owner].append(hidden.float().cpu())
    return {name: torch.cat(tensors) for name, tensors in parts.items()}


def save_states(path: Path, states: States) -> None:
    """Keep the source's states for the next run with the same source and windows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in states.items()}, temporary)


def load_states(path: Path, sets: dict[str, Windows]) -> States | None:
    """Kept states, or None if they are not there or not whole."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in sets}
    except Exception:
        return None


@dataclass(frozen=True)
class TokenScores:
    """Per window (windows, tokens - 1) float32: losses and divergence in nats, agreement 0 or 1.

    `counts` (same shape, bool) is False where the target is padding. A NaN from a broken model is not padding: it
    stays, makes the measurement NaN, and fails every gate on it.
    """

    source_loss: Tensor
    loss: Tensor
    divergence: Tensor
    agreement: Tensor
    counts: Tensor


def score(
    source: tuple[Checkpoint, States],
    candidate: tuple[Checkpoint, States],
    sets: dict[str, Windows],
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress,
) -> dict[str, TokenScores]:
    """Compare two models token by token. Hidden states are after the final norm."""
    scores: dict[str, TokenScores] = {}
    skeletons = [Skeleton(checkpoint.config, device, dtype) for checkpoint, _ in (source, candidate)]
    total = sum(len(windows.ids) for windows in sets.values())
    with (
        skeletons[0].head(source[0]) as first,
        skeletons[1].head(candidate[0]) as second,
        progress.task("logits", total) as advance,
    ):
        for name, windows in sets.items():
            rows: list[tuple[Tensor, ...]] = []
            for index in range(len(windows.ids)):
                ids = windows.ids[index].to(device)
                pair = source[1][name][index].to(device), candidate[1][name][index].to(device)
                rows.append(_score_window(first.logits, second.logits, pair, ids))
                advance(name)
            columns = [torch.stack(column).cpu() for column in zip(*rows, strict=True)]
            counts = torch.ones_like(columns[0], dtype=torch.bool)
            if windows.mask is not None:
                counts = windows.mask[:, 1:] != 0
            scores[name] = TokenScores(columns[0], columns[1], columns[2], columns[3], counts)
    return scores


def _score_window(first, second, pair: tuple[Tensor, Tensor], ids: Tensor) -> tuple[Tensor, ...]:  # type: ignore[no-untyped-def]
    """Scores of one window; pair: final states (tokens, hidden) of both models; ids (tokens,)."""
    parts: list[tuple[Tensor, ...]] = []
    positions = len(ids) - 1
    for start in range(0, positions, TOKENS_AT_ONCE):
        stop = min(start + TOKENS_AT_ONCE, positions)
        targets = ids[start + 1 : stop + 1].unsqueeze(1)
        log_p = first(pair[0][start:stop]).log_softmax(-1)
        log_q = second(pair[1][start:stop]).log_softmax(-1)
        agreement = (log_p.argmax(-1) == log_q.argmax(-1)).float()
        losses = -log_p.gather(1, targets).squeeze(1), -log_q.gather(1, targets).squeeze(1)
        divergence = log_p.exp().mul_(log_p.sub_(log_q)).sum(-1).clamp_min_(0)
        parts.append((*losses, divergence, agreement))
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def summarise(evaluations: tuple[OnText, ...], scores: dict[str, TokenScores]) -> tuple[Measured, Measured]:
    """Flat measurements of source and candidate, for what the recipe asks."""
    source, candidate = Measured(), Measured()
    for evaluation in evaluations:
        name, tokens = evaluation.set_name, scores[evaluation.set_name]
        if evaluation.kind == "perplexity":
            _perplexity(f"perplexity.{name}", tokens, source, candidate)
        else:
            _divergence(f"divergence.{name}", tokens, candidate)
    return source, candidate


def _perplexity(name: str, tokens: TokenScores, source: Measured, candidate: Measured) -> None:
    for measured, loss in ((source, tokens.source_loss), (candidate, tokens.loss)):
        mean, (low, high) = _interval(loss, tokens.counts)
        measured.values[name] = _exp(mean)
        measured.intervals[name] = (_exp(low), _exp(high))
    _, (low, high) = _interval(tokens.loss - tokens.source_loss, tokens.counts)
    candidate.ratio_intervals[name] = (_exp(low), _exp(high))
    candidate.paired[name] = _windows(tokens.source_loss, tokens.loss, tokens.counts)


def _divergence(name: str, tokens: TokenScores, candidate: Measured) -> None:
    values = tokens.divergence[tokens.counts].double()
    mean, interval = _interval(tokens.divergence, tokens.counts)
    agreement, agreement_interval = _interval(tokens.agreement, tokens.counts)
    candidate.values.update(
        {
            f"{name}.mean_kl": mean,
            f"{name}.median_kl": float(values.median()),
            f"{name}.kl_p99": _quantile(values, 0.99),
            f"{name}.kl_p999": _quantile(values, 0.999),
            f"{name}.max_kl": float(values.max()),
            f"{name}.top1_agreement": agreement,
        }
    )
    nothing = torch.zeros_like(tokens.divergence)
    candidate.paired[f"{name}.mean_kl"] = _windows(nothing, tokens.divergence, tokens.counts)
    candidate.intervals[f"{name}.mean_kl"] = (max(0.0, interval[0]), interval[1])
    candidate.intervals[f"{name}.top1_agreement"] = (max(0.0, agreement_interval[0]), min(1.0, agreement_interval[1]))


def _windows(source: Tensor, compressed: Tensor, counts: Tensor) -> Paired:
    """Means of each window that has tokens; scores and counts (windows, tokens)."""
    kept = counts.sum(1)
    rows = kept > 0
    means = [
        (scores.double().masked_fill(~counts, 0).sum(1)[rows] / kept[rows]).numpy() for scores in (source, compressed)
    ]
    ids = tuple(str(index) for index in rows.nonzero().flatten().tolist())
    return Paired("windows", ids, means[0], means[1], kept[rows].double().numpy())


def _quantile(values: Tensor, fraction: float) -> float:
    """Quantile by sorting: torch.quantile refuses more than 16 million values."""
    ordered = values.sort().values
    return float(ordered[min(len(ordered) - 1, math.ceil(fraction * len(ordered)) - 1)])


def _exp(value: float) -> float:
    """exp, with infinity instead of an overflow."""
    return math.exp(value) if value < 700 else math.inf if value == value else math.nan


def _interval(scores: Tensor, counts: Tensor) -> tuple[float, Interval]:
    kept = counts.sum(1)
    rows = kept > 0
    means = scores.double().masked_fill(~counts, 0).sum(1)[rows] / kept[rows]
    return mean_interval(means, kept[rows])


@torch.no_grad()
def quick_perplexities(
    checkpoint: Checkpoint, states: States, sets: dict[str, Windows], device: torch.device, dtype: torch.dtype
) -> dict[str, float]:
    """Perplexity of one model on the first windows of each set: what the health check looks at."""
    skeleton = Skeleton(checkpoint.config, device, dtype)
    with skeleton.head(checkpoint) as head:
        return {
            name: _exp(float(torch.cat([_losses(head, windows, states[name], row) for row in _first(windows)]).mean()))
            for name, windows in sets.items()
        }


def _first(windows: Windows) -> range:
    return range(min(HEALTH_WINDOWS, len(windows.ids)))


def _losses(head: Head, windows: Windows, states: Tensor, row: int) -> Tensor:
    """Negative log-likelihood in nats of every token but the first of one window, float64, padding left out."""
    ids = windows.ids[row].to(head.weight.device)
    parts = []
    for start in range(0, len(ids) - 1, TOKENS_AT_ONCE):
        stop = min(start + TOKENS_AT_ONCE, len(ids) - 1)
        logits = head.logits(states[row, start:stop].to(ids.device))
        parts.append(torch.nn.functional.cross_entropy(logits, ids[start + 1 : stop + 1], reduction="none"))
    losses = torch.cat(parts).cpu().double()
    return losses if windows.mask is None else losses[windows.mask[row, 1:].bool()]
