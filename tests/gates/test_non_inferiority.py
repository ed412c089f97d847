"""Three verdicts, nothing evaluated, and several gates at once."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from pydantic import ValidationError

from compress.evaluation.paired import Paired
from compress.gates import (
    Facts,
    Judgement,
    NonInferiorityGate,
    RelativeGate,
    SizeGate,
    ThresholdGate,
    adjusted,
    overall,
)
from tests.evaluation.test_difference import items, windows

ACCURACY, PERPLEXITY, KL = "task.capitals.accuracy", "perplexity.s", "divergence.s.mean_kl"


def judge(measure: str, paired: Paired, margin: float, **fields: float) -> Judgement:
    gate = NonInferiorityGate(measure=measure, margin=margin, **fields)
    return gate.judge(Facts(source={}, compressed={}, paired={measure: paired}))


@pytest.mark.parametrize(
    ("lost", "won", "verdict"), [(0, 0, "passed"), (12, 11, "passed"), (30, 5, "inconclusive"), (90, 10, "failed")]
)
def test_accuracy_is_judged_by_flips(lost, won, verdict):
    assert judge(ACCURACY, items(lost, won, 900 - lost - won, 100), 0.03).verdict == verdict


@pytest.mark.parametrize(("rise", "verdict"), [(0.02, "passed"), (0.05, "inconclusive"), (0.08, "failed")])
def test_perplexity_is_judged_as_a_ratio(rise, verdict):
    noise = np.random.default_rng(0).normal(0, 0.01, 16)
    noise -= noise.mean()
    source = np.linspace(2, 4, 16)
    found = judge(PERPLEXITY, windows((source + math.log1p(rise) + noise).tolist(), source.tolist()), 0.05)
    assert found.verdict == verdict
    assert found.observed == pytest.approx(rise) and found.units == 16


def test_divergence_is_judged_in_nats():
    assert judge(KL, windows([0.05, 0.06, 0.055, 0.052]), 0.1).verdict == "passed"
    assert judge(KL, windows([0.15, 0.16, 0.155, 0.152]), 0.1).verdict == "failed"


def test_nothing_evaluated_fails():
    gate = NonInferiorityGate(measure=ACCURACY, margin=0.02)
    assert gate.judge(Facts(source={}, compressed={})).verdict == "failed"
    assert judge(ACCURACY, items(0, 0, 0), 0.02).verdict == "failed"
    assert judge(KL, windows([0.01]), 0.02).verdict == "failed"


def test_a_model_that_answers_nan_fails():
    assert judge(KL, windows([0.01, math.nan, 0.01]), 0.5).verdict == "failed"


@pytest.mark.parametrize(
    ("margin", "said"),
    [(0, "above 0"), (-0.1, "above 0"), (math.nan, "finite"), (math.inf, "finite"), (1.0, "every model meets it")],
)
def test_a_margin_that_no_model_or_every_model_meets_is_refused(margin, said):
    with pytest.raises(ValidationError, match=said):
        NonInferiorityGate(measure=ACCURACY, margin=margin)


@pytest.mark.parametrize("gate", [ThresholdGate, RelativeGate, SizeGate])
def test_a_bound_that_cannot_be_missed_is_refused(gate):
    name = "max" if gate is ThresholdGate else "max_ratio"
    fields = {} if gate is SizeGate else {"measure": PERPLEXITY}
    with pytest.raises(ValidationError, match="finite"):
        gate(**fields, **{name: math.inf})


def test_the_sentence_says_what_was_lost_and_on_how_many_items():
    sentence = judge(ACCURACY, items(30, 5, 865, 100), 0.03).sentence
    assert "lost 2.5 points" in sentence and "1000 items, 30 lost and 5 gained" in sentence


def failure(p_beyond: float) -> Judgement:
    return Judgement("non_inferiority", "m", 0.1, None, "", "failed", "s", p_within=0.9, p_beyond=p_beyond, alpha=0.05)


def test_one_failure_among_many_gates_must_be_significant_among_them():
    weak = [failure(0.04), *[replace(failure(0.9), verdict="passed")] * 4]
    assert [each.verdict for each in adjusted(weak)] == ["inconclusive", *["passed"] * 4]
    strong = [failure(0.0001), *weak[1:]]
    assert adjusted(strong)[0].verdict == "failed"
    assert adjusted([failure(0.04)])[0].verdict == "failed"


def test_advisory_gates_do_not_make_a_failure_less_significant():
    advisory = [replace(failure(0.9), verdict="passed", tier="advisory")] * 9
    assert adjusted([failure(0.04), *advisory])[0].verdict == "failed"


def test_gates_that_are_no_tests_are_not_adjusted():
    threshold = Judgement("threshold", "m", 1.0, None, "", "failed", "s")
    assert adjusted([threshold, failure(0.04)]) == [threshold, failure(0.04)]


@pytest.mark.parametrize(
    ("judged", "verdict"),
    [
        ([("critical", "passed"), ("advisory", "failed")], "passed"),
        ([("critical", "passed"), ("supporting", "inconclusive")], "passed"),
        ([("critical", "passed"), ("supporting", "failed")], "inconclusive"),
        ([("critical", "inconclusive"), ("critical", "passed")], "inconclusive"),
        ([("critical", "failed"), ("critical", "inconclusive")], "failed"),
        ([("supporting", "passed"), ("advisory", "passed")], "failed"),
        ([], "failed"),
    ],
)
def test_tiers_decide_how_much_a_gate_says(judged, verdict):
    judgements = [Judgement("threshold", "m", 1.0, None, "", each, "s", tier=tier) for tier, each in judged]
    assert overall(judgements) == verdict
