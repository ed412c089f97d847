"""The map of bits and errors: every linear as the last stage left it, cut into pieces that stay readable."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from compress.reports.maps import (
    PIECE,
    bits_text,
    error_cells,
    error_legend,
    error_levels,
    error_table,
    last_records,
    pieces,
    unmeasured,
)
from compress.reports.report import KeptRecord, ModuleRecord, StageRecord
from compress.reports.tables import worst_table
from compress.reports.words import MISSING

from .example import DIGEST, example_report, stages


def record(name: str, block: int, scheme: str, error: float | None, bits: float = 4.25) -> ModuleRecord:
    return ModuleRecord(name=name, block=block, scheme=scheme, error=error, seconds=1, effective_bits=bits)


def stage(*modules: ModuleRecord) -> StageRecord:
    return stages()[0].model_copy(update={"modules": list(modules), "fingerprint": DIGEST})


def test_an_infinite_or_undefined_error_is_the_largest_there_is() -> None:
    errors = {"a": 0.2, "b": float("inf"), "c": 0.9, "d": float("nan"), "e": None}
    rows = worst_table(stage(*(record(name, 0, "int4", error) for name, error in errors.items()))).rows

    assert [(row[0], row[2]) for row in rows] == [("b", "inf"), ("d", "nan"), ("c", "0.9"), ("a", "0.2")]


def test_thirty_blocks_are_three_pieces_of_equal_width_with_every_linear() -> None:
    found = pieces(error_cells(example_report()), "bits")
    roots = [ElementTree.fromstring(piece) for piece in found]
    assert len(found) == 30 / PIECE == 3
    assert len({root.get("viewBox") for root in roots}) == 1
    assert sum(len(root.findall("g")) for root in roots) == 210


def test_the_last_stages_word_counts() -> None:
    first = stage(record("0.a", 0, "int8 channel", 0.1), record("0.b", 0, "int8 channel", 0.2))
    last = stage(record("0.b", 0, "int3 group 32", 0.4))
    cells = error_cells(example_report(stages=[first, last]))
    assert [(cell.kind, cell.text) for cell in cells] == [("a", "8"), ("b", "3")]


def test_an_error_stays_where_a_later_stage_measures_none() -> None:
    solved = stage(record("0.a", 0, "int4 channel", 0.1), record("0.b", 0, "int4 channel", 0.4))
    trained = stage(record("0.a", 0, "int4 channel", None), record("0.b", 0, "int8 channel", None))
    trained = trained.model_copy(update={"kind": "recover"})
    report = example_report(stages=[solved, trained])
    assert {name: found.error for name, found in last_records(report).items()} == {"0.a": 0.1, "0.b": None}
    assert unmeasured(report) == "Errors are those before recover, which measured none."
    assert unmeasured(example_report(stages=[solved])) == ""
    other = stage(record("0.b", 0, "int8 channel", None)).model_copy(update={"kind": "round_to_nearest"})
    assert unmeasured(example_report(stages=[solved, other])) == "", "no error of that scheme was kept"


def test_linears_that_were_not_quantised_are_there_too() -> None:
    kept = [KeptRecord(name=f"{block}.down", block=block, dtype="bfloat16") for block in (0, 1)]
    modules = [record("0.up", 0, "int4 channel", 0.1), record("1.down", 1, "int8 channel", 0.2)]
    report = example_report(stages=[stage(*modules)], kept=kept)

    cells = {(cell.kind, cell.block): (cell.text, cell.title) for cell in error_cells(report)}
    assert cells["down", 0] == ("16", "0.down: bfloat16, not quantised") and cells["down", 1][0] == "8"
    assert set(cells) == {("up", 0), ("down", 0), ("down", 1)}
    assert error_legend(report)[-1] == ("errornone", "not quantised")
    assert ("errornone", "not quantised") not in error_legend(example_report())
    assert error_table(report).rows == [("0", "4 b, 0.1", "16 b, kept"), ("1", MISSING, "8 b, 0.2")]


def test_the_worst_of_many_experts_is_shown() -> None:
    experts = [record(f"0.experts.{at}.up", 0, f"int{at + 2} channel", 0.1 * at) for at in range(3)]
    assert [cell.text for cell in error_cells(example_report(stages=[stage(*experts)]))] == ["4"]


def test_shades_go_from_the_least_to_the_largest_error_and_missing_ones_have_their_own() -> None:
    errors = [0.001, 0.01, 0.1, 1.0, None, float("nan"), 0.0]
    modules = [record(f"{at}.up", at, "int4 channel", error) for at, error in enumerate(errors)]
    report = example_report(stages=[stage(*modules)])
    styles = [cell.style for cell in error_cells(report)]
    assert styles[0] == "error0" and styles[3] == "error4" and styles == [*sorted(styles[:4]), *styles[4:]]
    assert styles[4:] == ["errornone", "errornone", "error0"]
    assert error_levels(errors)[-1] == pytest.approx(1.0) and len(error_legend(report)) == 5


@pytest.mark.parametrize(
    ("scheme", "bits", "wanted"), [("int4 symmetric group 64", 4.25, "4"), ("nf4", 4.5, "4"), ("plain", 16.0, "16")]
)
def test_bits_are_those_of_the_scheme_without_its_scales(scheme: str, bits: float, wanted: str) -> None:
    assert bits_text(record("0.a", 0, scheme, None, bits)) == wanted


def test_the_same_in_words_for_faces_without_pictures() -> None:
    table = error_table(example_report())
    assert table.headers[:2] == ("Block", "q_proj") and len(table.rows) == 30
    assert table.rows[0][1].startswith("4 b, 0.00")


def test_without_linears_there_is_no_map() -> None:
    assert pieces(error_cells(example_report(stages=[])), "") == []
