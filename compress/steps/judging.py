"""Measure the source once and the export as it lies on disk, and let the gates judge."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from compress.calibration.windows import Windows
from compress.checkpoints.reader import Checkpoint, is_float
from compress.checkpoints.sources import cache_folder
from compress.evaluation.measure import (
    Measured,
    States,
    TokenScores,
    load_states,
    quick_perplexities,
    save_states,
    score,
    summarise,
    walk_states,
)
from compress.evaluation.tasks.compare import Comparison
from compress.events import OF_MAKING, Event, Progress
from compress.files import digest_of_json
from compress.gates import EventsGate, Facts, Gate, Judgement, ThresholdGate, adjusted, overall
from compress.gates.base import Look, Tier, Verdict
from compress.recipe import Recipe
from compress.steps.candidate import Candidate
from compress.steps.environment import Machine, code_digest, fits, versions
from compress.steps.noise import Noise, noise_floor
from compress.steps.plan import Plan
from compress.steps.round_trip import BOUND, BOUND_OF_STEPS, COMPARED_TOKENS, COMPARED_WINDOWS, Reloaded, reload
from compress.steps.source import OpenedSource, check_perplexity
from compress.steps.texts import Texts


@dataclass(frozen=True)
class Baseline:
    """Final hidden states of the source on every set, and what of them is noise."""

    states: States
    events: tuple[Event, ...]
    noise: tuple[Noise, ...] = ()


def measure_source(
    recipe: Recipe, source: OpenedSource, texts: Texts, machine: Machine, progress: Progress
) -> Baseline:
    """Walk the source on the sets that no earlier run kept its states of; check its health.

    What is kept is one file a set, so another recipe with the same set and other ones reads it too.
    """
    paths = {name: _kept(source, windows, machine) for name, windows in texts.evaluation.items()}
    states: States = {}
    for name, path in paths.items():
        kept = load_states(path, {"states": texts.evaluation[name]})
        states |= {name: kept["states"]} if kept else {}
    reused = tuple(states)
    missing = {name: windows for name, windows in texts.evaluation.items() if name not in states}
    if missing:
        label = "measuring the source"
        walked = walk_states(
            source.checkpoint, missing, machine.device, machine.compute, machine.tokens_at_once, progress, label
        )
        for name, tensor in walked.items():
            save_states(paths[name], {"states": tensor})
        states = {name: (states | walked)[name] for name in texts.evaluation}
    events: tuple[Event, ...] = ()
    if reused:
        message = f"the source's hidden states on {', '.join(reused)} came from the cache"
        events = (Event("baseline_reused", "source", message),)
    perplexities = quick_perplexities(source.checkpoint, states, texts.evaluation, machine.device, machine.compute)
    check_perplexity(perplexities, recipe.model.max_perplexity)
    return Baseline(states, events)


def with_noise(
    baseline: Baseline, source: OpenedSource, texts: Texts, machine: Machine, progress: Progress
) -> Baseline:
    """The baseline with its noise floor."""
    paths = {name: _kept(source, windows, machine) for name, windows in texts.evaluation.items()}
    noise = noise_floor(source.checkpoint, baseline.states, texts.evaluation, paths, machine, progress)
    return replace(baseline, noise=noise)


def _kept(source: OpenedSource, windows: Windows, machine: Machine) -> Path:
    """Where the source's states on a set are kept, whatever the set is called."""
    key = digest_of_json(
        {
            "source": source.digest,
            "windows": windows.digest,
            "machine": machine.to_json(),
            "code": code_digest(),
            "versions": versions(),
        }
    )
    return cache_folder() / "baselines" / f"{key}.safetensors"


@dataclass(frozen=True)
class Evidence:
    """All measurements of a run, and the export's round trip (None if it could not be loaded)."""

    source: Measured
    compressed: Measured
    reloaded: Reloaded | None
    events: tuple[Event, ...]
    noise: tuple[Noise, ...] = ()
    scores: dict[str, TokenScores] = field(default_factory=dict)
    """By set, token by token: what the measurements on text were summed up from."""
    tasks: tuple[Comparison, ...] = ()


def measure_candidate(
    plan: Plan, candidate: Candidate, reference: OpenedSource, baseline: Baseline, texts: Texts, progress: Progress
) -> tuple[Evidence, States]:
    """Measure the judged model as it lies on disk; also its final hidden states."""
    scores, states = scores_of(plan, candidate, reference, baseline, texts, progress)
    before, after = summarise(plan.recipe.on_text, scores)
    before.values["weight_bytes"] = float(reference.checkpoint.weight_bytes)
    after.values["weight_bytes"] = float(candidate.stored_bytes)
    bits = _effective_bits(candidate, plan.matrices)
    if bits is not None:
        after.values["effective_bits"] = bits
    return Evidence(before, after, None, (), baseline.noise, scores), states


def scores_of(
    plan: Plan, candidate: Candidate, reference: OpenedSource, baseline: Baseline, texts: Texts, progress: Progress
) -> tuple[dict[str, TokenScores], States]:
    """Both models token by token on every set, and the judged one's final hidden states."""
    machine = plan.machine
    states = walk_states(
        candidate.checkpoint,
        texts.evaluation,
        machine.device,
        machine.compute,
        machine.tokens_at_once,
        progress,
        f"measuring the {candidate.noun}",
    )
    scores = score(
        (reference.checkpoint, baseline.states),
        (candidate.checkpoint, states),
        texts.evaluation,
        machine.device,
        machine.compute,
        progress,
    )
    return scores, states


def round_trip(
    plan: Plan, candidate: Candidate, texts: Texts, evidence: Evidence, states: States, progress: Progress
) -> Evidence:
    """The evidence with what the public loader gave, or with the event that it could not be tried."""
    if candidate.files is None:
        message = "transformers has no loader that keeps a .gguf file packed; resident memory was not measured"
        return replace(evidence, events=(Event("round_trip_skipped", candidate.noun, message),))
    if candidate.loader_lacks:
        message = f"{' and '.join(candidate.loader_lacks)} are not installed here, and its public loader needs them"
        return replace(evidence, events=(Event("round_trip_skipped", candidate.noun, message),))
    if not fits(plan.parameters, plan.reload_bytes, plan.machine):
        message = "the export does not fit in memory at once, so its public loader was not tried; run it where it fits"
        return replace(evidence, events=(Event("round_trip_skipped", "export", message),))
    name = next(iter(texts.evaluation))
    windows, ours = texts.evaluation[name].first(COMPARED_WINDOWS), states[name]
    if any(scheme.inputs for scheme in candidate.checkpoint.schemes.values()):
        windows = windows.shortened(COMPARED_TOKENS)
        ours = _float32_states(plan, candidate.checkpoint, windows, progress, as_loaded=True)
    elif plan.machine.compute is not torch.float32:
        ours = _float32_states(plan, candidate.checkpoint, windows, progress)
    with progress.task("reloading through the public loader", 1) as advance:
        reloaded = reload(candidate.folder, candidate.checkpoint, windows, ours, plan.machine)
        advance("")
    evidence.compressed.values.update(
        {
            "round_trip.mean_kl": reloaded.mean_kl,
            "round_trip.max_abs_logit_difference": reloaded.max_abs_logit_difference,
            "resident_bytes": float(reloaded.resident_bytes),
            "kv_cache_bytes": float(measured_kv_cache(plan, reloaded)),
        }
    )
    return replace(evidence, reloaded=replace(reloaded, bound=bound_of(candidate, plan.machine)))


def _float32_states(
    plan: Plan, checkpoint: Checkpoint, windows: Windows, progress: Progress, as_loaded: bool = False
) -> Tensor:
    """Our states of a few windows once more, in float32, where the walk computes in 16 bits.

    `as_loaded`: linears that round their inputs do it as the public loader does, one window at a time, for the outliers
    of LLM.int8 are those of a whole call.
    """
    machine, sets = plan.machine, {"round trip": windows}
    at_once = windows.ids.shape[1] if as_loaded else machine.tokens_at_once
    label = "reading the export in float32"
    states = walk_states(checkpoint, sets, machine.device, torch.float32, at_once, progress, label, as_loaded)
    return states["round trip"]


def measured_kv_cache(plan: Plan, reloaded: Reloaded) -> int:
    """The real cache of a short prompt, scaled to the recipe's context and concurrency and to the stored dtype."""
    from compress.memory.predict import kv_cache_bytes

    small = kv_cache_bytes(plan.dimensions, reloaded.prompt_tokens, 1, reloaded.kv_dtype_bytes)
    return round(plan.kv_cache_bytes * reloaded.kv_cache_bytes_per_prompt / small)


def _effective_bits(candidate: Candidate, matrices: dict[str, tuple[int, int]]) -> float | None:
    """8 x bytes of the quantised linears as they lie in the files / their parameters; None where none is quantised."""
    found = candidate.files
    if found is None:
        return candidate.effective_bits
    stored = parameters = 0
    for module, (rows, columns) in matrices.items():
        names = [name for name in found.module_tensors(module) if name != f"{module}.bias"]
        if names == [f"{module}.weight"] and is_float(found.header(names[0])[0]):
            continue
        stored += sum(found.tensor_bytes(name) for name in names)
        parameters += rows * columns
    return 8 * stored / parameters if parameters else None


def judge(
    recipe: Recipe,
    evidence: Evidence,
    counts: dict[str, int],
    source_bytes: int,
    candidate: Candidate,
    looks: dict[str, Look],
) -> tuple[Verdict, list[Judgement]]:
    """Every gate of the recipe on measurements and `counts` of events, and the round trip, which is always a gate when
    it was made; it only informs where its loader is also what the weights were read through."""
    facts = Facts(
        source=evidence.source.values,
        compressed=evidence.compressed.values,
        intervals=evidence.compressed.intervals,
        ratio_intervals=evidence.compressed.ratio_intervals,
        event_counts=counts,
        paired=evidence.compressed.paired,
        looks=looks,
        source_bytes=float(source_bytes),
    )
    judgements = adjusted([_judge(gate, facts) for gate in recipe.gates])
    nothing_judged = all(judgement.tier == "advisory" for judgement in judgements)
    if evidence.reloaded is not None:
        tier: Tier = "critical" if candidate.is_read_directly else "advisory"
        judgements.append(
            replace(
                ThresholdGate(measure="round_trip.mean_kl", max=evidence.reloaded.bound).judge(facts),
                tier=tier,
            )
        )
    verdict = overall(judgements)
    # The round trip says that the model loads. Where no gate of the recipe could decide, that is not enough to pass.
    return ("inconclusive" if verdict == "passed" and nothing_judged else verdict), judgements


def bound_of(candidate: Candidate, machine: Machine) -> float:
    """Largest mean KL between loader and our reading that counts as rounding."""
    schemes = candidate.checkpoint.schemes.values()
    steps = any(scheme.outliers or (scheme.inputs and machine.device.type != "cpu") for scheme in schemes)
    return BOUND_OF_STEPS if steps else BOUND


def _judge(gate: Gate, facts: Facts) -> Judgement:
    """How a gate judges. One on events of a making that nobody recorded cannot: it is shown, and decides nothing."""
    judgement = replace(gate.judge(facts), tier=gate.tier)
    if isinstance(gate, EventsGate) and gate.event in OF_MAKING and gate.event not in facts.event_counts:
        sentence = f"How this model was made is not recorded, so its {gate.event} events cannot be counted: not judged."
        return replace(judgement, verdict="inconclusive", tier="advisory", sentence=sentence)
    return judgement
