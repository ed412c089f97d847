"""What happened along the way: events that end in the artifact, and progress that ends on the screen.

An event is a departure from the plan: rounding instead of GPTQ, raised damping, a skipped module, a missing
calibration sample. It is written to events.jsonl, counted in the report, and gates can bound the counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

EVENT_KINDS: dict[str, str] = {
    "calibration_shortfall": "fewer calibration samples or tokens were obtained than asked for",
    "rounding_fallback": "a module was rounded because the GPTQ factorisation failed at every damping",
    "rounding_kept": "solving a module came out worse than rounding it to the same grid; the rounded codes were kept",
    "damping_raised": "the factorisation needed more damping than the recipe asked for",
    "dead_columns": "input columns never excited by the calibration data; their weights were rounded, not solved",
    "target_shift_skipped": "a linear's target was not shifted: too few calibration tokens, or no factor",
    "token_weights_skipped": "calibration tokens of a group count alike: gradients were not finite, or all zero",
    "outputs_skipped": "what the output depends on was not used: gradients not finite, or a linear was worse for it",
    "refit_skipped": "what stays of a pruned linear was not refitted: no factor of its Hessian",
    "importance_fallback": "pieces to prune were chosen by activation: no factor of the Hessian",
    "refinement_skipped": "scales and codes were not refined: too few calibration windows to hold some out",
    "torch_columns": "a GPU without Triton or a CPU without numba: torch rounded the columns, equally but slowly",
    "recover_kept_input": "training lowered no held-out divergence; the stage's input was shipped unchanged",
    "recover_block_wise": "training went block by block: the whole model would not fit in memory",
    "codes_unmoved": "codes were trained, and not one of them changed",
    "recover_trained_less": "scales and norms were trained in place of codes, whose training would not fit in memory",
    "training_resumed": "training went on from a step that an interrupted run had saved",
    "sampled_again": "calibration text kept from an earlier run was damaged, and was sampled from the model again",
    "alone_held_back": "what linears cost alone is no positive number or over 8 times off; it was not followed",
    "uniform_kept": "no mixture of schemes within the budget beat a uniform scheme; the precision plan is uniform",
    "module_kept": "a matrix was left in its source precision: the recipe ignores it, or its plan gives it 16 bits",
    "round_trip_skipped": "the exported model was not reloaded through its public loader",
    "stage_reused": "a finished stage with the same fingerprint was reused",
    "blocks_resumed": "finished blocks of an interrupted run were reused",
    "baseline_reused": "the source measurements came from the cache",
    "read_through_loader": "weights of a format compress does not read were taken from what its own loader computes",
    "fused_apart": "parts of what vLLM fuses have schemes of their own: it fails on them, or computes other values",
    "tokenizer_left_out": "the format cannot express the tokenizer; the artifact takes token ids only",
    "scales_rounded": "scales of a linear are too small for the format's float16, and lost precision",
    "tokenizer_borrowed": "the judged model brings no tokenizer; the source's was used",
    "calibration_unknown": "what the judged model was calibrated on is not known, so overlap could not be checked",
    "task_skipped": "a task that needs generated text was not asked: the whole model does not fit in memory",
    "latency_skipped": "the times of both models were not compared: no memory for both, or no loader",
    "source_was_quantized": "the source weights came from a quantised file",
    "few_calibration_tokens": "fewer calibration tokens than input columns: the Hessian is rank deficient",
    "windows_repeated": "windows of an evaluation text repeated earlier ones and were left out: a copy is no evidence",
    "text_truncated": "documents were shortened to the length of the evaluation or calibration window",
}
"""Every event kind and what it means. Gates refuse kinds that are not listed here."""

OF_FILES = frozenset({"fused_apart", "scales_rounded", "tokenizer_left_out"})
"""Kinds that tell of one format's files: an export to another format has its own."""

OF_MAKING = frozenset(
    {
        "calibration_shortfall",
        "sampled_again",
        "rounding_fallback",
        "rounding_kept",
        "damping_raised",
        "dead_columns",
        "target_shift_skipped",
        "token_weights_skipped",
        "outputs_skipped",
        "refit_skipped",
        "importance_fallback",
        "refinement_skipped",
        "torch_columns",
        "recover_kept_input",
        "recover_block_wise",
        "recover_trained_less",
        "codes_unmoved",
        "training_resumed",
        "alone_held_back",
        "uniform_kept",
        "module_kept",
        *OF_FILES,
        "stage_reused",
        "blocks_resumed",
        "few_calibration_tokens",
    }
)
"""Kinds that tell how a model was made: who only judges one cannot count them."""


@dataclass(frozen=True)
class Event:
    """One departure from the plan: `where` is a stage, module or data set; `data` holds numbers that matter."""

    kind: str
    where: str
    message: str
    data: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def count_by_kind(events: Iterable[Event]) -> dict[str, int]:
    """Number of events per kind, every known kind present."""
    counts = Counter(event.kind for event in events)
    return {kind: counts.get(kind, 0) for kind in EVENT_KINDS}


class Progress(Protocol):
    """What long work tells the screen. The console implements it; tests and libraries pass `Quiet()`."""

    def task(self, label: str, total: int) -> Any:
        """Context manager giving a callable `advance(note: str = "")` to be called once per finished unit."""


class Quiet:
    """Progress that says nothing."""

    @contextmanager
    def task(self, label: str, total: int) -> Iterator[Callable[[str], None]]:
        del label, total

        def advance(note: str = "") -> None:
            del note

        yield advance
