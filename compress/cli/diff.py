"""`compress diff`: what differs between two artifacts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from compress.cli.options import DEFAULT_STORE, JsonOption, StoreOption

if TYPE_CHECKING:
    from compress.artifacts.diff import Difference, Field_, Measure
    from compress.artifacts.diff_layers import Layers

SideArgument = typer.Argument(help="NAME, NAME@v0003, NAME@r0001, NAME@production or a folder.")


def diff(
    a: Annotated[str, SideArgument],
    b: Annotated[str, SideArgument],
    store: StoreOption = DEFAULT_STORE,
    json: JsonOption = False,
) -> int:
    """Compare two artifacts: recipe, stages, measurements, gates, layers, sizes, environment."""
    from compress import console
    from compress.artifacts.diff import difference
    from compress.artifacts.store import Store

    opened = Store(store)
    found = difference(opened.find(a), opened.find(b))
    if json:
        console.print_json(found.model_dump(mode="json"))
    else:
        _print(found)
    return 0


def _print(found: Difference) -> None:
    from compress import console

    for letter, side in (("a", found.a), ("b", found.b)):
        parent = f", made from {side.parent}" if side.parent else ""
        console.print_line(f"{letter}  {side.reference}  {side.verdict}  {side.created}{parent}")
    console.print_line("The models are the same, byte for byte." if found.same_model else "The models differ.")
    _print_fields("recipe", found.recipe)
    _print_fields("stages", found.stages)
    if not found.comparable:
        apart = next(note for note in found.notes if note.startswith("not measured"))
        console.print_line(f"\n{apart[0].upper()}{apart[1:]}.")
    _print_measures("measurements", found.measurements, comparable=found.comparable)
    gates = [
        [
            gate.gate,
            gate.verdict_a or "-",
            gate.verdict_b or "-",
            _number(gate.gate, gate.observed_a),
            _number(gate.gate, gate.observed_b),
            gate.limit_a or "-" if gate.limit_a == gate.limit_b else f"{gate.limit_a or '-'} | {gate.limit_b or '-'}",
        ]
        for gate in found.gates
    ]
    if gates:
        console.print_line()
        console.print_table("gates", ["gate", "a", "b", "observed a", "observed b", "limit"], gates)
    _print_layers(found.layers)
    _print_measures("sizes", found.sizes, as_bytes=True)
    _print_fields("lineage", found.lineage)
    _print_fields("environment", found.environment)
    for note in found.notes:
        console.note(f"note: {note}")


def _print_fields(title: str, found: tuple[Field_, ...]) -> None:
    from compress import console

    console.print_line()
    if not found:
        console.print_line(f"{title}: the same")
        return
    rows = []
    for field in found:
        a, b = _short(field.a), _short(field.b)
        # What differs must look different.
        rows.append([field.name, a, b] if a != b else [field.name, str(field.a), str(field.b)])
    console.print_table(title, ["field", "a", "b"], rows)


def _print_measures(title: str, found: tuple[Measure, ...], as_bytes: bool = False, comparable: bool = True) -> None:
    from compress import console

    if not found:
        return
    rows = [
        [
            each.name,
            _number("bytes" if as_bytes else each.name, each.a),
            _number("bytes" if as_bytes else each.name, each.b),
            _number("bytes" if as_bytes else each.name, each.difference),
            "-" if each.ratio is None else f"{each.ratio:.4f}",
            _interval(each.interval_a),
            _interval(each.interval_b),
            "" if each.apart is None or not comparable else "apart" if each.apart else "overlap",
        ]
        for each in found
    ]
    columns = ["measure", "a", "b", "b - a", "b / a", "interval a", "interval b", ""]
    width = 5 if as_bytes else len(columns)
    console.print_line()
    console.print_table(title, columns[:width], [row[:width] for row in rows])


def _print_layers(found: Layers) -> None:
    from compress import console

    console.print_line()
    if found.median_error_ratio is None:
        console.print_line(f"layers: {found.compared} in both; no errors that compare")
    else:
        console.print_line(
            f"layers: {found.compared} in both; of those with the same scheme {found.better} have a smaller error in "
            f"b, {found.worse} a larger one; errors b / a, median: {found.median_error_ratio:.3f}"
        )
    if found.note:
        console.print_line(found.note)
    if found.schemes:
        rows = [
            [str(each.linears), each.a or "not quantised", each.b or "not quantised", ", ".join(each.examples)]
            for each in found.schemes
        ]
        console.print_table("schemes that differ", ["linears", "a", "b", "such as"], rows)
    if found.farthest:
        rows = [
            [layer.name, f"{layer.error_a:.3g}", f"{layer.error_b:.3g}", f"{layer.error_b / layer.error_a:.3f}"]
            for layer in found.farthest
            if layer.error_a and layer.error_b is not None
        ]
        console.print_table("errors farthest apart", ["layer", "a", "b", "b / a"], rows)


def _number(name: str, value: float | None) -> str:
    from compress import console

    if value is None:
        return "-"
    return console.bytes_text(value) if name.endswith("bytes") else f"{value:.5g}"


def _interval(value: tuple[float, float] | None) -> str:
    return "" if value is None else f"{value[0]:.4g} to {value[1]:.4g}"


def _short(value: Any, most: int = 60) -> str:
    text = "-" if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)
    return text if len(text) <= most else f"{text[: most - 3]}..."
