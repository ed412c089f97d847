"""One Report value from everything a run made."""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime
from typing import Any

from compress.checkpoints.reader import Checkpoint
from compress.evaluation.discordance import flips, mcnemar
from compress.evaluation.tasks.compare import Comparison, examples
from compress.events import count_by_kind
from compress.gates import Judgement
from compress.memory.measure import PeakSampler
from compress.memory.predict import kv_cache_bytes
from compress.recipe import Recipe
from compress.reports.limits import limits
from compress.reports.report import (
    AlternativeRecord,
    AnswerPair,
    AnswersRecord,
    ArtifactRef,
    Flip,
    GateResult,
    JudgedRecord,
    KeptRecord,
    LookRecord,
    Measurements,
    Memory,
    NoiseRecord,
    PredictedMeasured,
    Report,
    RoundTrip,
    ServingPoint,
    StageRecord,
    TaskRecord,
)
from compress.steps.candidate import Asked, Candidate
from compress.steps.deciding import Decision
from compress.steps.environment import provenance
from compress.steps.judging import Evidence, measured_kv_cache
from compress.steps.origin import described
from compress.steps.parent import Parent
from compress.steps.plan import Plan
from compress.steps.prompts import Conversation
from compress.steps.round_trip import Reloaded
from compress.steps.source import OpenedSource
from compress.steps.texts import Texts, calibration_facts

CONCURRENCIES = (1, 4, 16, 64)
"""Sequences at once that the KV cache is predicted for, beside those of the recipe."""


def assemble(
    plan: Plan,
    source: OpenedSource,
    texts: Texts,
    stages: list[StageRecord],
    decision: Decision,
    talk: Conversation | None,
    sampler: PeakSampler,
    seconds_by_step: dict[str, float],
    started: datetime,
    artifact: ArtifactRef,
    of: JudgedRecord | None = None,
    alone: AlternativeRecord | None = None,
    parent: Parent | None = None,
    made: Checkpoint | None = None,
) -> Report:
    """The report of a run, or with `of` one of an evaluation; `artifact` is where the model is or will be, `alone` what
    a pruned model is compared with, `parent` the version whose codes these are in another format, `made` the checkpoint
    that was exported."""
    recipe, evidence, events = plan.recipe, decision.evidence, decision.events
    report = Report(
        verdict=decision.verdict,
        gates=[_gate(judgement) for judgement in decision.judgements],
        measurements=Measurements(
            source=evidence.source.values,
            compressed=evidence.compressed.values,
            intervals=evidence.compressed.intervals,
        ),
        memory=_memory(plan, source, evidence, sampler, predicted=of is None),
        quantised_alone=alone,
        stages=stages,
        kept=_kept(made, plan) if made else [],
        round_trip=_round_trip(evidence),
        events=events,
        event_counts={kind: count for kind, count in count_by_kind(events).items() if count},
        tasks=[_task(comparison, evidence) for comparison in evidence.tasks],
        evaluation=_evaluation(recipe, texts, decision),
        answers=_answers(talk),
        noise=[NoiseRecord(**asdict(noise)) for noise in evidence.noise],
        looks=[
            LookRecord(name=name, looks=look.number, units=look.sizes[look.number - 1], most=look.sizes[-1])
            for name, look in decision.looks.items()
        ],
        calibration=parent.calibration if parent else calibration_facts(texts.calibration),
        provenance=_provenance(plan, source, started, seconds_by_step, is_run=of is None) | _made_from(parent),
        seconds_by_step=seconds_by_step,
        artifact=artifact,
        parent=parent.artifact if parent else None,
        judged=of,
    )
    return report.model_copy(update={"limits": limits(report)})


def judged(plan: Plan, asked: Asked, candidate: Candidate, reference: OpenedSource) -> JudgedRecord:
    """What an evaluation judged, for its report."""
    return JudgedRecord(
        model=asked.model.text,
        folder=str(candidate.folder),
        digest=candidate.digest,
        architecture=plan.architecture.model_type,
        parameters=plan.parameters,
        reference=asked.against.text if asked.against else plan.recipe.model.label,
        reference_digest=reference.digest,
        making_recorded=candidate.recorded is not None,
    )


def _kept(made: Checkpoint, plan: Plan) -> list[KeptRecord]:
    """Linears of blocks that are exported as they were; none where nothing was quantised."""
    if not made.schemes:
        return []
    architecture, dtype = made.architecture, str(plan.stored).removeprefix("torch.")
    return [
        KeptRecord(name=name, block=block, dtype=dtype)
        for block in range(made.block_count)
        for linear in architecture.linears
        if (name := f"{architecture.block_name(block)}.{linear}") not in made.schemes and made.has(f"{name}.weight")
    ]


def _made_from(parent: Parent | None) -> dict[str, Any]:
    if parent is None:
        return {}
    own = f"{parent.reference}, whose own verdict was {parent.verdict}; model digest {parent.artifact.digest}"
    return {"made_from": own}


def _gate(judgement: Judgement) -> GateResult:
    return GateResult(
        kind=judgement.kind,
        measure=judgement.measure,
        observed=judgement.observed,
        interval=judgement.interval,
        limit=judgement.limit,
        verdict=judgement.verdict,
        sentence=judgement.sentence,
        tier=judgement.tier,
        units=judgement.units,
        p_within=judgement.p_within,
        p_beyond=judgement.p_beyond,
    )


def _memory(plan: Plan, source: OpenedSource, evidence: Evidence, sampler: PeakSampler, predicted: bool) -> Memory:
    """`predicted`: the bytes of the weights were predicted from a recipe's stages."""
    reloaded = evidence.reloaded
    return Memory(
        stored=PredictedMeasured(
            predicted=plan.stored_bytes if predicted else None,
            measured=evidence.compressed.values["weight_bytes"],
            note="tensors of the files",
        ),
        resident=PredictedMeasured(
            predicted=plan.resident_bytes if predicted else None,
            measured=reloaded.resident_bytes if reloaded else None,
            note="parameters and buffers as the public loader holds them before its first forward"
            + (
                ""
                if not predicted or plan.resident_bytes == plan.stored_bytes
                else "; it unpacks this scheme while loading"
            ),
        ),
        kv_cache=PredictedMeasured(
            predicted=plan.kv_cache_bytes,
            measured=measured_kv_cache(plan, reloaded) if reloaded else None,
            note=_cache_note(plan, reloaded) if reloaded else "",
        ),
        context=plan.recipe.export.context,
        concurrency=plan.recipe.export.concurrency,
        peak_host=PredictedMeasured(
            predicted=plan.peak_host_bytes,
            measured=sampler.peak,
            note=_by_phase(sampler.peaks),
        ),
        peak_device=PredictedMeasured(
            predicted=plan.peak_device_bytes, measured=sampler.device_peak, note=_by_phase(sampler.device_peaks)
        ),
        source_stored=source.checkpoint.weight_bytes,
        serving=_serving(plan),
        max_context=plan.dimensions.max_context,
    )


def _by_phase(peaks: dict[str, int]) -> str:
    return "by phase: " + ", ".join(f"{name} {peak >> 20} MiB" for name, peak in peaks.items()) if peaks else ""


def _cache_note(plan: Plan, reloaded: Reloaded) -> str:
    """How the cache was measured; where a stage prepares for 8 bits, that the loader's was none."""
    note = f"measured on {reloaded.prompt_tokens} tokens and scaled"
    prepared = plan.kv_bytes
    if prepared != plan.stored.itemsize:
        note += (
            f" from the loader's {reloaded.kv_dtype_bytes} bytes an element to {prepared}, which no runtime has held"
        )
    return note


def _serving(plan: Plan) -> list[ServingPoint]:
    """The KV cache at the export's load, and at contexts up to the longest the model declares, halved five times."""
    export, longest = plan.recipe.export, plan.dimensions.max_context
    contexts = sorted({export.context, *(longest >> step for step in range(6) if longest >> step)})
    return [
        ServingPoint(
            context=context,
            concurrency=many,
            kv_cache_bytes=kv_cache_bytes(plan.dimensions, context, many, plan.kv_bytes),
        )
        for context in contexts
        for many in sorted({export.concurrency, *CONCURRENCIES})
    ]


def _round_trip(evidence: Evidence) -> RoundTrip | None:
    reloaded = evidence.reloaded
    if reloaded is None:
        return None
    return RoundTrip(
        loader=reloaded.loader,
        tokens=reloaded.tokens,
        max_abs_logit_difference=reloaded.max_abs_logit_difference,
        mean_kl=reloaded.mean_kl,
        bound=reloaded.bound,
        passed=reloaded.mean_kl <= reloaded.bound,
    )


def _task(comparison: Comparison, evidence: Evidence) -> TaskRecord:
    prepared = comparison.prepared
    name, facts = f"task.{prepared.name}", dict(prepared.facts)
    before, after = evidence.source, evidence.compressed
    found = flips(after.paired[f"{name}.accuracy"])
    return TaskRecord(
        name=prepared.name,
        type=facts.pop("type"),
        source=facts.pop("source"),
        items=len(prepared.ids),
        available=prepared.available,
        few_shot=facts.pop("few_shot"),
        chat_template=facts.pop("chat_template"),
        prompts_digest=prepared.digest,
        floor=prepared.spec.floor,
        accuracy_source=before.values[f"{name}.accuracy"],
        accuracy_compressed=after.values[f"{name}.accuracy"],
        interval_source=before.intervals[f"{name}.accuracy"],
        interval_compressed=after.intervals[f"{name}.accuracy"],
        nll_source=before.values.get(f"{name}.nll"),
        nll_compressed=after.values.get(f"{name}.nll"),
        lost=found.lost,
        gained=found.gained,
        degraded_p=mcnemar(found),
        lost_examples=[Flip(**example) for example in examples(comparison, lost=True)],
        gained_examples=[Flip(**example) for example in examples(comparison, lost=False)],
        overlap_with_calibration=comparison.overlap,
        items_file=f"reports/items/{prepared.name}.jsonl",
        facts=facts,
    )


def _answers(talk: Conversation | None) -> AnswersRecord | None:
    if talk is None or not talk.candidate:
        return None
    pairs = [
        AnswerPair(id=prompt.id, prompt=prompt.text, source=before, compressed=after)
        for prompt, before, after in zip(talk.prompts, talk.source, talk.candidate, strict=True)
    ]
    return AnswersRecord(
        asked=str(talk.spec.file) if talk.spec.file else "compress's own prompts",
        chat_template=talk.template,
        max_new_tokens=talk.spec.max_new_tokens,
        prompts_digest=talk.digest,
        pairs=pairs,
    )


def _evaluation(recipe: Recipe, texts: Texts, decision: Decision) -> list[dict[str, Any]]:
    sets: list[dict[str, Any]] = []
    for name in texts.evaluation:
        windows = texts.seen(name, decision.looks[name].number if name in decision.looks else 1)
        kinds = [spec.kind for spec in recipe.on_text if spec.set_name == name]
        protocol = (
            f"{windows.ids.shape[0]} non-overlapping {windows.ledger['layout']} windows of {windows.ids.shape[1]} "
            "tokens; every token but a window's first is predicted from those before it in the window; float32 "
            "log-softmax over the whole vocabulary"
        )
        sets.append(
            {
                "set": name,
                "measures": kinds,
                "protocol": protocol,
                "overlap_with_calibration": texts.overlap[name],
                **windows.ledger,
            }
        )
    return sets


def _provenance(
    plan: Plan, source: OpenedSource, started: datetime, seconds_by_step: dict[str, float], is_run: bool
) -> dict[str, Any]:
    facts = source.source.facts
    size = {"parameters": plan.parameters} if is_run else {}
    return {
        "source": {
            "name": plan.recipe.model.label,
            "id": facts.get("id"),
            "digest": source.digest,
            "folder": str(source.source.folder),
            "architecture": source.checkpoint.architecture.model_type,
            **size,
            **facts,
            **described(source.source),
        },
        "recipe_digest": plan.recipe.digest(),
        "machine": plan.machine.to_json(),
        "started": started.isoformat(timespec="seconds"),
        "seconds": sum(seconds_by_step.values()),
        "seconds_predicted": plan.seconds,
        **provenance(),
        "recipe": plan.recipe.dump(),
    }
