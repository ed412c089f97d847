"""The report of one run as a frozen value. `report.json` is this, serialised; every other face is drawn from it.

Units: bytes are bytes, seconds are seconds, KL is in nats per token. `None` means "not measured", never zero.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict, Field

from compress.events import Event
from compress.reports.changes import PreviousRecord
from compress.reports.value import Value as Value
from compress.reports.value import Verdict as Verdict

SCHEMA_VERSION = 1


class GateResult(Value):
    """How one gate judged one measurement."""

    kind: str
    measure: str
    observed: float | None = Field(description="the value judged (a ratio for relative gates); None if not measured")
    interval: tuple[float, float] | None = Field(default=None, description="confidence interval of `observed`")
    limit: str = Field(description="the bound in words, e.g. '<= 0.1' or '<= 1.08 x source'")
    verdict: Verdict
    sentence: str = Field(description="one sentence a reviewer can quote")
    tier: Literal["critical", "supporting", "advisory"] = Field(
        default="critical", description="critical gates decide; a supporting one that fails leaves the verdict open"
    )
    units: int | None = Field(default=None, description="items or windows that decided, where the gate is a test")
    p_within: float | None = Field(default=None, description="one-sided p-value of 'worse than the margin'")
    p_beyond: float | None = Field(default=None, description="one-sided p-value of 'within the margin', unadjusted")


class PredictedMeasured(Value):
    """One quantity, predicted by `plan` and measured by `run`; either may be missing."""

    predicted: float | None = None
    measured: float | None = None
    note: str = ""


class ServingPoint(Value):
    """The KV cache of one load, as predicted."""

    context: int = Field(description="tokens of each sequence")
    concurrency: int = Field(description="sequences at once")
    kv_cache_bytes: int


class Memory(Value):
    """All in bytes."""

    stored: PredictedMeasured = Field(description="tensor bytes in the exported safetensors files")
    resident: PredictedMeasured = Field(description="weights in memory once loaded by a runtime that keeps them packed")
    kv_cache: PredictedMeasured = Field(description="KV cache at `context` tokens and `concurrency` sequences")
    context: int
    concurrency: int
    peak_host: PredictedMeasured = Field(description="peak anonymous host memory of the run")
    peak_device: PredictedMeasured = Field(description="peak device memory of the run; missing without a GPU")
    source_stored: int = Field(description="tensor bytes of the source safetensors files")
    serving: list[ServingPoint] = Field(
        default_factory=list,
        description="KV cache over contexts, up to the longest declared, and concurrency",
    )
    max_context: int | None = Field(default=None, description="longest context that the model's config declares")


class ModuleRecord(Value):
    """What a stage did to one linear."""

    name: str
    block: int | None = Field(description="None for embedding and head")
    scheme: str = Field(description="e.g. int4 symmetric group 64")
    error: float | None = Field(
        description="relative output error tr(dW H dW^T) / tr(W H W^T) on calibration inputs, W the (shifted) target"
    )
    rounding_error: float | None = Field(default=None, description="the same for plain rounding to the same grid")
    damping: float | None = Field(default=None, description="damping used, as a fraction of mean(diag H)")
    refined: bool = Field(default=False, description="scales and codes were refined, and held-out windows agreed")
    seconds: float
    effective_bits: float
    events: list[str] = Field(default_factory=list)


class KeptRecord(Value):
    """A linear of a block that no stage quantised."""

    name: str
    block: int
    dtype: str = Field(description="of the file, e.g. float16")


class StageRecord(Value):
    """What one stage did, and what it cost."""

    kind: str
    config: dict[str, Any]
    fingerprint: str
    seconds: float
    reused: bool = False
    weight_bytes_before: int
    weight_bytes_after: int
    peak_host_bytes: int | None = None
    seconds_by_part: dict[str, float] = Field(default_factory=dict, description="forward, hessian, solve, write, ...")
    modules: list[ModuleRecord] = Field(default_factory=list)
    facts: dict[str, Any] = Field(
        default_factory=dict, description="what else the stage tells of itself, e.g. held-out KL before and after"
    )


class RoundTrip(Value):
    """The exported folder through its public loader, against our own reading of the same files."""

    loader: str
    tokens: int
    max_abs_logit_difference: float
    mean_kl: float
    bound: float = Field(description="largest mean KL (nats) that is accepted as rounding")
    passed: bool


class Measurements(Value):
    """Flat names such as `perplexity.<set>`, `divergence.<set>.mean_kl`, `weight_bytes`."""

    source: dict[str, float]
    compressed: dict[str, float]
    intervals: dict[str, tuple[float, float]] = Field(default_factory=dict, description="of compressed measures, 95 %")


class Flip(Value):
    """An item that one model got right and the other did not."""

    id: str
    context_tail: str = Field(description="the end of the prompt")
    cut: bool = Field(description="the prompt is longer than what is shown")
    choices: list[str]
    answer: str
    source: str = Field(description="what the source chose or wrote")
    compressed: str


class TaskRecord(Value):
    """One task as both models answered it; every item is in `items_file`."""

    name: str
    type: str
    source: str = Field(description="where the items are from")
    items: int = Field(description="how many were asked")
    available: int = Field(description="how many could have been")
    few_shot: int
    chat_template: str | None = Field(description="digest of the template, equal on both sides; None if none was used")
    prompts_digest: str = Field(description="sha256 over every prompt's tokens and every right answer")
    floor: float | None = Field(description="accuracy the source had to reach")
    accuracy_source: float
    accuracy_compressed: float
    interval_source: tuple[float, float] = Field(description="Wilson, 95 %")
    interval_compressed: tuple[float, float] = Field(description="Wilson, 95 %")
    nll_source: float | None = Field(default=None, description="mean nats of a whole answer; cloze only")
    nll_compressed: float | None = None
    lost: int = Field(description="items that only the source got right")
    gained: int = Field(description="items that only the compressed model got right")
    degraded_p: float | None = Field(
        default=None, description="exact one-sided McNemar p-value of 'no more lost than gained'"
    )
    lost_examples: list[Flip]
    gained_examples: list[Flip]
    overlap_with_calibration: float = Field(description="share of the questions' n-grams found in calibration windows")
    items_file: str = Field(description="JSON lines below the artifact: both models' answers to every item")
    facts: dict[str, Any] = Field(default_factory=dict, description="file digest, versions, where examples came from")


class AlternativeRecord(Value):
    """What quantising alone, nothing pruned, gives at no more bytes than the artifact takes."""

    scheme: str | None = Field(description="of all linears, solved by gptq; None where no scheme takes so little")
    weight_bytes: int | None = Field(description="tensor bytes of the whole model in that scheme, packed")
    limit_bytes: int = Field(description="tensor bytes of the artifact")
    values: dict[str, float] = Field(description="measures on the evaluation texts, named as in `measurements`")
    caveats: list[str] = Field(description="what makes the comparison uneven, a sentence each")


class ArtifactRef(Value):
    path: str
    name: str
    version: str
    digest: str = Field(description="sha256 over 'sha256  path' lines of model/, sorted by path, README.md left out")


class AnswerPair(Value):
    """One prompt and what both models wrote."""

    id: str
    prompt: str
    source: str
    compressed: str


class AnswersRecord(Value):
    """Prompts for people to compare answers; nothing is judged by them."""

    asked: str = Field(description="where the prompts are from")
    chat_template: str | None = Field(description="digest of the template, equal on both sides; None if none was used")
    max_new_tokens: int
    prompts_digest: str = Field(description="sha256 over every prompt's tokens")
    pairs: list[AnswerPair]


class NoiseRecord(Value):
    """The source against itself on the first windows of a set, in batches of another size."""

    name: str
    windows: int
    batch: int = Field(description="windows in a batch, as everywhere in the run")
    other_batch: int = Field(description="windows in a batch for this comparison")
    mean_kl: float = Field(description="nats a token; what lies below it is no difference between models")
    perplexity_ratio: float
    top1_agreement: float


class LookRecord(Value):
    """A set or task that could be looked at more than once."""

    name: str
    looks: int = Field(description="how many there were")
    units: int = Field(description="windows or items at the last of them")
    most: int = Field(description="windows or items at the last that there could have been")


class JudgedRecord(Value):
    """What `compress eval` judged, and what it was compared with."""

    model: str = Field(description="as it was named on the command line")
    folder: str
    digest: str
    architecture: str
    parameters: int
    reference: str = Field(description="what `source` means in this report: the recipe's source, or a release")
    reference_digest: str
    making_recorded: bool = Field(description="the model brings a report that tells how it was made")


class Report(Value):
    """The whole report. Stable and versioned by `schema`."""

    schema_: int = Field(default=SCHEMA_VERSION, alias="schema")
    verdict: Verdict
    gates: list[GateResult]
    measurements: Measurements
    memory: Memory
    stages: list[StageRecord]
    kept: list[KeptRecord] = Field(
        default_factory=list, description="linears of blocks that were not quantised, where others were"
    )
    round_trip: RoundTrip | None
    events: list[Event]
    event_counts: dict[str, int]
    tasks: list[TaskRecord] = Field(default_factory=list, description="questions with answers, if any were asked")
    answers: AnswersRecord | None = Field(default=None, description="both models' answers to prompts, for people")
    quantised_alone: AlternativeRecord | None = Field(
        default=None, description="of a pruned model: what quantising alone gives at the same bytes, for comparison"
    )
    noise: list[NoiseRecord] = Field(default_factory=list, description="noise floor of each set")
    looks: list[LookRecord] = Field(default_factory=list, description="sets and tasks that could grow")
    evaluation: list[dict[str, Any]] = Field(description="each set: name, windows, tokens, protocol, digest, source")
    calibration: dict[str, Any] = Field(description="requested, obtained, dropped, digest, descriptor, licence")
    provenance: dict[str, Any] = Field(
        description="source (digest, revision, architecture, parameters, note), recipe digest, versions, device, "
        "threads, command, git state, started, seconds, recipe text"
    )
    seconds_by_step: dict[str, float] = Field(description="the run's steps in order: source, baseline, stage ...")
    artifact: ArtifactRef
    parent: ArtifactRef | None = Field(
        default=None, description="of `compress export`: the version whose integers these are, in another format"
    )
    judged: JudgedRecord | None = Field(
        default=None, description="of `compress eval` only; nothing was compressed then"
    )
    previous: PreviousRecord | None = Field(
        default=None, description="what changed against the release before; None where there was none"
    )
    limits: list[str] = Field(default_factory=list, description="what was not tested, a sentence each")

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, ser_json_inf_nan="strings")
