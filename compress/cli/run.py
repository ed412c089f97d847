"""`compress run` and `compress plan`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compress.cli.options import DEFAULT_STORE, JsonOption, RecipeArgument, SetOption, StoreOption, quiet_libraries
from compress.cli.outputs import GithubOption, JunitOption, Outputs
from compress.errors import ExitCode

if TYPE_CHECKING:
    from compress.pipeline import Outcome
    from compress.reports.report import GateResult
    from compress.steps.plan import Plan


def run(
    recipe: RecipeArgument,
    store: StoreOption = DEFAULT_STORE,
    set_: SetOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and predict only, like `compress plan`.")] = False,
    json: JsonOption = False,
    junit: JunitOption = None,
    github: GithubOption = False,
) -> int:
    """Compress a model as a recipe says, judge it, publish it.

    Exit codes: 0 passed, 2 bad recipe, 3 a gate failed, 4 a gate is inconclusive, 5 unhealthy source, 6 out of memory
    or disk, 7 the environment lacks something, 130 interrupted, 1 internal error or a
    damaged version.
    """
    from compress import parallel

    with parallel.joined():
        if parallel.started_to_follow():
            return _follow()
        from compress.steps.following import leading

        with leading():
            if dry_run:
                return plan(recipe, store, set_, json)
            return _run(recipe, store, set_, json, Outputs(junit, github))


def _run(recipe: Path, store: Path, set_: list[str] | None, json: bool, outputs: Outputs) -> int:
    from compress import console
    from compress.recipe import load_recipe

    loaded = load_recipe(recipe, tuple(set_ or ()))
    quiet_libraries()
    from compress.pipeline import plan as predict
    from compress.pipeline import run as run_plan

    progress = console.StageProgress()
    planned = predict(loaded, store, progress)
    _print_prediction(planned)
    outcome = run_plan(planned, store, progress)
    if json:
        console.print_json(outcome.report.model_dump(mode="json", by_alias=True))
    else:
        print_outcome(outcome)
    outputs.write(outcome.report, outcome.html)
    return int(outcome.exit_code)


def _follow() -> int:
    """What a process does that torchrun has started beside the one that runs the recipe."""
    from compress.parallel import PeerEndedError
    from compress.steps.following import follow

    quiet_libraries()
    try:
        follow()
    except PeerEndedError:
        return int(ExitCode.INTERNAL_ERROR)  # whoever ended has said why
    return int(ExitCode.PASSED)


def plan(
    recipe: RecipeArgument, store: StoreOption = DEFAULT_STORE, set_: SetOption = None, json: JsonOption = False
) -> int:
    """Check a recipe against model, machine and disk; predict bytes, memory and time.

    Computes nothing, but a .gguf source is converted once and kept.
    """
    from compress import console
    from compress.recipe import load_recipe

    loaded = load_recipe(recipe, tuple(set_ or ()))
    quiet_libraries()
    from compress.pipeline import plan as predict

    planned = predict(loaded, store, console.StageProgress())
    if json:
        console.print_json(planned.to_json())
        return 0
    facts = planned.to_json()
    rows = [
        ["model", f"{planned.recipe.model.label}: {facts['architecture']}, {facts['parameters']:,} parameters"],
        *_pruned_row(facts),
        ["device", f"{facts['device']}, artifact in {facts['stored_dtype']}"],
        ["quantised", f"{facts['quantised_linears']} of {facts['linears']} linears: {', '.join(facts['schemes'])}"],
        *([name, label] for name, label in facts["vocabulary"].items()),
        ["effective bits", f"{facts['effective_bits']:.3f}" if facts["effective_bits"] else "-"],
        ["stored", f"{console.bytes_text(facts['stored_bytes'])} (source {console.bytes_text(facts['source_bytes'])})"],
        ["resident", console.bytes_text(facts["resident_bytes"])],
        [
            "KV cache",
            f"{console.bytes_text(facts['kv_cache_bytes'])} at {facts['context']} tokens x {facts['concurrency']}",
        ],
        ["stages", ", ".join(facts["stages"])],
        ["peak host memory", console.bytes_text(facts["peak_host_bytes"])],
        *_device_row(facts["peak_device_bytes"]),
        ["disk while running", console.bytes_text(facts["disk_bytes"])],
        ["time", f"about {console.seconds_text(facts['seconds'])}, within a factor of two"],
    ]
    console.print_table(f"plan for {planned.recipe.name}", ["", ""], rows)
    for budget in planned.budgets:
        console.print_line(f"budget: {budget}; schemes above are a stand-in until linears have been measured")
    for power in planned.powers:
        console.print_line(f"gate: {power.sentence}")
    for warning in planned.warnings:
        console.print_line(f"warning: {warning}")
    return 0


def _device_row(peak: int | None) -> list[list[str]]:
    from compress import console

    return [] if peak is None else [["peak device memory", console.bytes_text(peak)]]


def _print_prediction(planned: Plan) -> None:
    from compress import console

    console.note(
        f"plan: stored {console.bytes_text(planned.stored_bytes)}, "
        f"KV cache {console.bytes_text(planned.kv_cache_bytes)}, "
        f"peak host memory {console.bytes_text(planned.peak_host_bytes)}, about {console.seconds_text(planned.seconds)}"
    )
    for warning in planned.warnings:
        console.note(f"warning: {warning}")


def print_outcome(outcome: Outcome) -> None:
    """The tables of a report and where it is."""
    from compress import console
    from compress.reports.pruning import alone_sentence

    report = outcome.report
    memory = report.memory
    console.print_table(
        "before and after",
        ["measure", "source", "compressed", "ratio"],
        console.before_after(report.measurements.source, report.measurements.compressed),
    )
    console.print_line()
    rows = []
    for name, value in (
        ("stored", memory.stored),
        ("resident", memory.resident),
        (f"KV cache, {memory.context} tokens x {memory.concurrency}", memory.kv_cache),
        ("peak host memory of the run", memory.peak_host),
        ("peak device memory of the run", memory.peak_device),
    ):
        if value.predicted is not None or value.measured is not None:
            rows.append([name, console.bytes_text(value.predicted), console.bytes_text(value.measured)])
    console.print_table("memory", ["", "predicted", "measured"], rows)
    console.print_line()
    console.print_table("gates", ["verdict", ""], [[_verdict(gate), gate.sentence] for gate in report.gates])
    if report.quantised_alone is not None:
        console.print_line(f"pruned, or only quantised: {alone_sentence(report, report.quantised_alone)}")
    counts = ", ".join(f"{kind} {count}" for kind, count in report.event_counts.items())
    console.print_line(f"events: {counts or 'none'}")
    console.print_line()
    seconds = console.seconds_text(sum(report.seconds_by_step.values()))
    if report.judged is not None:
        console.print_verdict(report.verdict, f"{report.judged.model} against {report.judged.reference}, in {seconds}")
    else:
        where = "published as" if report.verdict == "passed" else "kept, not published, as"
        console.print_verdict(report.verdict, f"{where} {outcome.folder} in {seconds}")
    if outcome.html is not None:
        console.print_line(f"report: {outcome.html}")


def _verdict(gate: GateResult) -> str:
    return gate.verdict if gate.tier == "critical" else f"{gate.verdict} ({gate.tier})"


def _pruned_row(facts: dict[str, Any]) -> list[list[str]]:
    """What stays of a model that a recipe prunes; no row for others."""
    if not facts["pruned"]:
        return []
    pieces = (f"{name.replace('_', ' ')} {before} -> {after}" for name, (before, after) in facts["pruned"].items())
    return [["pruned", f"{', '.join(pieces)}: {facts['parameters_after']:,} parameters stay"]]
