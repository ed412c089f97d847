"""`compress frontier`: points that hold together, kept measurements, a page, and mistakes."""

from __future__ import annotations

import json

import pytest

from tests.end_to_end.test_mixed import mixed
from tests.helpers import changed, write_recipe


@pytest.fixture
def budgeted(glass_recipe, tmp_path):
    return write_recipe(tmp_path / "r.yaml", mixed(glass_recipe, {"effective_bits": 4.4}))


def test_more_bytes_are_less_divergence_and_mixtures_beat_uniform_schemes_of_their_size(budgeted, here, tmp_path):
    ended = here("frontier", budgeted, "--bits", "3.7,4.2,5.5", "--max-kl", "0.02", "--out", tmp_path / "out", "--json")
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)
    points = found["points"]
    mixtures = [point for point in points if point["scheme"] is None]
    uniform = [point for point in points if point["scheme"]]
    assert len(uniform) == 4 and len(mixtures) >= 3
    assert [point["kl"] for point in mixtures] == sorted((point["kl"] for point in mixtures), reverse=True)
    assert all(point["within_bound"] == (point["kl"] <= 0.02) for point in points)
    smallest = found["smallest"]
    assert smallest["kl"] <= 0.02
    assert all(point["linear_bytes"] >= smallest["linear_bytes"] for point in mixtures if point["kl"] <= 0.02)
    assert json.loads((tmp_path / "out" / "frontier.json").read_text()) == found
    page = (tmp_path / "out" / "frontier.html").read_text()
    assert page.count('<circle class="solved"') == len(mixtures) and page.count('<rect class="uniform"') == 4
    assert "<script" not in page and "http" not in page.replace("http-equiv", "")


def test_a_second_frontier_measures_only_what_is_new(budgeted, here, monkeypatch):
    assert here("frontier", budgeted, "--bits", "4,5").code == 0
    from compress.stages import tuning

    def never(*arguments, **options):
        raise AssertionError("measured again")

    monkeypatch.setattr(tuning, "score", never)
    ended = here("frontier", budgeted, "--bits", "4,5")
    assert ended.code == 0 and "mixture" in ended.out


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--bits", "4;5"), "numbers with commas"),
        (("--bits", "0,4"), "above 0"),
        (("--bits", "2"), "takes 3.5"),
        (("--max-kl", "-1"), "above 0"),
        (("--points", "0"), "--points"),
        (("--out", __file__), "is a file"),
        (("--out", f"{__file__}/below"), "is a file"),
    ],
)
def test_budgets_that_make_no_sense_are_refused(budgeted, here, more, said):
    ended = here("frontier", budgeted, *more)
    assert ended.code == 2 and said in ended.err


def test_a_bound_that_no_mixture_meets_is_said(budgeted, here):
    ended = here("frontier", budgeted, "--bits", "4", "--max-kl", "1e-9")
    assert ended.code == 0 and "No mixture of these candidates" in ended.out


def test_a_recipe_without_candidates_has_no_frontier(glass_recipe, here, tmp_path):
    ended = here("frontier", write_recipe(tmp_path / "r.yaml", changed(glass_recipe)))
    assert ended.code == 2 and "mixed_precision" in ended.err
