"""Two models' answers: accuracies, intervals, flips in both directions, and broken models that are wrong."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from compress.evaluation.measure import Measured
from compress.evaluation.tasks.compare import Comparison, examples, measure, wilson, write_items
from compress.evaluation.tasks.prepare import Prepared
from compress.evaluation.tasks.results import Answer, Answers, Asked, load, save
from compress.evaluation.tasks.spec import Task


def answers(*best: int, **more: Any) -> Answers:
    """Items with three choices, the first right; `best[i]` is what the model finds likeliest."""
    asked, given = [], []
    for number, choice in enumerate(best):
        likelihoods = tuple(-1.0 if at == choice else -3.0 for at in range(3))
        asked.append(Asked(id=f"i{number}", context="q" * 400, choices=("a", "b", "c"), answer="a", answer_index=0))
        given.append(Answer(id=f"i{number}", correct=choice == 0, loglikelihoods=likelihoods, **more))
    return Answers(asked=tuple(asked), answers=tuple(given))


def comparison(source: Answers, compressed: Answers, spec: Task | None = None) -> Comparison:
    ids = tuple(asked.id for asked in source.asked)
    spec = spec or Task(name="t", file=Path("t.jsonl"))
    return Comparison(Prepared(spec, None, None, ids, (), len(ids), False, "d", {}), source, compressed, 0.0)


def test_accuracy_interval_and_pairs_are_of_the_same_items():
    both = comparison(answers(0, 0, 1, 0), answers(0, 2, 0, 0))
    source, compressed = Measured(), Measured()
    measure(both, source, compressed)
    assert source.values == {"task.t.accuracy": 0.75} and compressed.values == {"task.t.accuracy": 0.75}
    pairs = compressed.paired["task.t.accuracy"]
    assert pairs.unit == "items" and pairs.ids == ("i0", "i1", "i2", "i3")
    assert pairs.source.tolist() == [1, 1, 0, 1] and pairs.compressed.tolist() == [1, 0, 1, 1]
    assert pairs.weights.tolist() == [1] * 4
    assert both.flips(lost=True) == [1] and both.flips(lost=False) == [2]
    assert set(source.intervals) == set(compressed.intervals) == {"task.t.accuracy"}


def test_wilsons_interval_by_hand():
    # n = 10, k = 9, z = 1.96: centre (0.9 + z^2/20) / (1 + z^2/10), half width z sqrt(0.009 + z^2/400) / (1 + z^2/10)
    z = 1.959964
    centre, reach = (0.9 + z**2 / 20) / (1 + z**2 / 10), z * math.sqrt(0.009 + z**2 / 400) / (1 + z**2 / 10)
    assert wilson(9, 10) == pytest.approx((centre - reach, centre + reach), abs=1e-6)
    assert wilson(0, 5)[0] == 0.0 and wilson(5, 5)[1] == 1.0


def test_the_loss_of_a_cloze_is_paired_too():
    spec = Task(name="t", file=Path("t.jsonl"), type="cloze")
    source = Answers(
        asked=tuple(Asked(id=i, context="q", answer="a") for i in "ab"),
        answers=(
            Answer(id="a", correct=True, loglikelihoods=(-1.0,), greedy=True),
            Answer(id="b", correct=False, loglikelihoods=(-3.0,), greedy=False),
        ),
    )
    before, after = Measured(), Measured()
    measure(comparison(source, source, spec), before, after)
    assert before.values["task.t.nll"] == 2.0 and after.paired["task.t.nll"].source.tolist() == [1.0, 3.0]


def test_examples_show_what_each_model_chose_and_at_most_five():
    both = comparison(answers(*[0] * 8), answers(*[1] * 8))
    shown = examples(both, lost=True)
    assert len(shown) == 5 and examples(both, lost=False) == []
    assert shown[0]["source"] == "a (-1.00 nats)" and shown[0]["compressed"] == "b (-1.00 nats)"
    assert len(shown[0]["context_tail"]) == 300 and shown[0]["cut"]


def test_items_are_one_line_each_with_both_answers(tmp_path):
    write_items([comparison(answers(0, 1), answers(1, 1))], tmp_path / "items")
    lines = [json.loads(line) for line in (tmp_path / "items" / "t.jsonl").read_text(encoding="utf-8").splitlines()]
    assert lines[0] == {
        "id": "i0",
        "flip": True,
        "answer": 0,
        "source": {"correct": True, "loglikelihoods": [-1.0, -3.0, -3.0]},
        "compressed": {"correct": False, "loglikelihoods": [-3.0, -1.0, -3.0]},
    }
    assert not lines[1]["flip"]


def test_kept_answers_read_back_equal_nan_included_and_damaged_ones_are_none(tmp_path):
    path = tmp_path / "kept" / "a.json"
    kept = answers(0, 1)
    nan = kept.answers[0].model_copy(update={"loglikelihoods": (float("nan"), -math.inf)})
    save(path, kept.model_copy(update={"answers": (nan, kept.answers[1])}))
    read = load(path)
    assert read is not None and read.answers[1] == kept.answers[1]
    assert math.isnan(read.answers[0].loglikelihoods[0]) and read.answers[0].loglikelihoods[1] == -math.inf
    path.write_text(path.read_text(encoding="utf-8")[:-20], encoding="utf-8")
    assert load(path) is None and load(tmp_path / "none.json") is None


def test_a_model_whose_likelihoods_are_nan_answers_nothing_right():
    pytest.importorskip("lm_eval")
    from compress.evaluation.tasks.results import _answer

    record = {"acc": 1.0, "acc_norm": 1.0, "resps": [[(float("nan"), True)], [(float("nan"), False)]]}
    answer = _answer("multiple_choice", "acc", "i", record)
    assert not answer.correct and answer.correct_norm is False
