"""Gates: every verdict, and that nothing missing, empty or NaN ever passes."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from compress.events import EVENT_KINDS
from compress.gates import EventsGate, Facts, MemoryGate, RelativeGate, SizeGate, ThresholdGate, overall

FACTS = Facts(
    source={"perplexity.s": 10.0, "zero": 0.0},
    compressed={"perplexity.s": 11.0, "kl": 0.05, "nan": math.nan, "infinite": math.inf, "zero": 1.0},
    intervals={"perplexity.s": (10.5, 11.5), "kl": (0.04, 0.06), "nan": (math.nan, math.nan)},
    ratio_intervals={"perplexity.s": (1.05, 1.15)},
    event_counts={"rounding_fallback": 2},
)


@pytest.mark.parametrize(
    ("bounds", "verdict"),
    [
        ({"max": 0.05}, "passed"),
        ({"max": 0.049}, "failed"),
        ({"min": 0.05}, "passed"),
        ({"min": 0.051}, "failed"),
        ({"min": 0.01, "max": 0.1}, "passed"),
        ({"max": 0.07, "use_interval": True}, "passed"),
        ({"max": 0.05, "use_interval": True}, "inconclusive"),
        ({"max": 0.03, "use_interval": True}, "failed"),
        ({"min": 0.03, "use_interval": True}, "passed"),
        ({"min": 0.05, "use_interval": True}, "inconclusive"),
        ({"min": 0.07, "use_interval": True}, "failed"),
    ],
)
def test_a_threshold_judges_the_value_or_its_interval(bounds, verdict):
    judged = ThresholdGate(measure="kl", **bounds).judge(FACTS)

    assert judged.verdict == verdict
    assert judged.observed == 0.05 and judged.interval == (0.04, 0.06)
    assert judged.sentence.endswith(f"{verdict}.")


@pytest.mark.parametrize(
    ("bounds", "verdict"),
    [
        ({"max_ratio": 1.1}, "passed"),
        ({"max_ratio": 1.09}, "failed"),
        ({"min_ratio": 1.1, "max_ratio": 1.2}, "passed"),
        ({"max_ratio": 1.2, "use_interval": True}, "passed"),
        ({"max_ratio": 1.1, "use_interval": True}, "inconclusive"),
        ({"max_ratio": 1.01, "use_interval": True}, "failed"),
    ],
)
def test_a_relative_gate_judges_the_ratio_to_the_source(bounds, verdict):
    judged = RelativeGate(measure="perplexity.s", **bounds).judge(FACTS)

    assert judged.verdict == verdict
    assert judged.observed == pytest.approx(1.1)


@pytest.mark.parametrize(("most", "verdict"), [(1, "failed"), (2, "passed"), (3, "passed")])
def test_an_events_gate_bounds_a_count(most, verdict):
    judged = EventsGate(event="rounding_fallback", max=most).judge(FACTS)

    assert (judged.verdict, judged.observed, judged.limit) == (verdict, 2.0, f"<= {most}")


@pytest.mark.parametrize(
    "gate",
    [
        ThresholdGate(measure="never.measured", max=1e9),
        ThresholdGate(measure="never.measured", max=1e9, use_interval=True),
        RelativeGate(measure="never.measured", max_ratio=1e9),
        RelativeGate(measure="kl", max_ratio=1e9),
        RelativeGate(measure="zero", max_ratio=1e9),
        EventsGate(event="dead_columns", max=1000),
    ],
)
def test_a_gate_that_evaluated_nothing_fails_and_says_so(gate):
    judged = gate.judge(FACTS)

    assert judged.verdict == "failed" and judged.observed is None
    assert "so the gate fails" in judged.sentence


@pytest.mark.parametrize("bounds", [{"max": 1e9}, {"min": -1e9}, {"max": 1e9, "use_interval": True}])
def test_nan_never_passes(bounds):
    assert ThresholdGate(measure="nan", **bounds).judge(FACTS).verdict == "failed"


def test_infinity_is_above_every_bound():
    assert ThresholdGate(measure="infinite", max=1e300).judge(FACTS).verdict == "failed"


@pytest.mark.parametrize(("most", "verdict"), [(10, "passed"), (1, "failed")])
def test_a_measure_without_an_interval_is_judged_by_its_value(most, verdict):
    facts = Facts({}, {"weight_bytes": 5.0})

    judged = ThresholdGate(measure="weight_bytes", max=most, use_interval=True).judge(facts)

    assert (judged.verdict, judged.interval) == (verdict, None)


@given(
    value=st.floats(allow_nan=True, allow_infinity=True),
    low=st.floats(-1e6, 1e6),
    width=st.floats(0, 1e6),
)
def test_a_point_verdict_is_exactly_membership(value, low, width):
    facts = Facts({}, {"m": value})

    verdict = ThresholdGate(measure="m", min=low, max=low + width).judge(facts).verdict

    assert (verdict == "passed") == (low <= value <= low + width)


@given(low=st.floats(-10, 10), width=st.floats(0, 10), bound=st.floats(-10, 20))
def test_an_interval_verdict_is_certain_or_says_it_is_not(low, width, bound):
    facts = Facts({}, {"m": low + width / 2}, {"m": (low, low + width)})

    verdict = ThresholdGate(measure="m", max=bound, use_interval=True).judge(facts).verdict

    expected = "passed" if low + width <= bound else "failed" if low > bound else "inconclusive"
    assert verdict == expected


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        ([], "failed"),
        (["passed"], "passed"),
        (["passed", "inconclusive"], "inconclusive"),
        (["inconclusive", "failed", "passed"], "failed"),
    ],
)
def test_the_whole_is_as_good_as_its_worst_gate_and_nothing_is_a_failure(verdicts, expected):
    gates = {"passed": 0.1, "inconclusive": 0.05, "failed": 0.01}
    judged = [ThresholdGate(measure="kl", max=gates[verdict], use_interval=True).judge(FACTS) for verdict in verdicts]

    assert overall(judged) == expected


@pytest.mark.parametrize("gate", [ThresholdGate, RelativeGate])
def test_a_gate_without_a_bound_is_refused(gate):
    with pytest.raises(ValidationError, match="a gate without a bound judges nothing"):
        gate(measure="kl")


def test_an_unknown_event_is_answered_with_the_nearest():
    with pytest.raises(ValidationError, match=r"no event is called 'rounding_falback'\. Did you mean \"rounding_f"):
        EventsGate(event="rounding_falback")


def test_every_known_event_can_be_bounded():
    for kind in EVENT_KINDS:
        assert EventsGate(event=kind).max == 0


SIZES = Facts(
    source={"weight_bytes": 100.0},  # what it is compared with; size is relative to the source all the same
    source_bytes=400.0,
    compressed={"weight_bytes": 100.0, "effective_bits": 4.25, "resident_bytes": 120.0, "kv_cache_bytes": 30.0},
)


@pytest.mark.parametrize(
    ("bounds", "verdict"),
    [
        ({"max_bytes": 100}, "passed"),
        ({"max_bytes": 99}, "failed"),
        ({"max_ratio": 0.25}, "passed"),
        ({"max_ratio": 0.24}, "failed"),
        ({"max_effective_bits": 4.25}, "passed"),
        ({"max_bytes": 200, "max_ratio": 0.3, "max_effective_bits": 4.0}, "failed"),
    ],
)
def test_a_size_gate_fails_on_the_first_bound_that_is_missed(bounds, verdict):
    assert SizeGate(**bounds).judge(SIZES).verdict == verdict


def test_a_size_gate_names_the_bound_that_was_missed():
    judgement = SizeGate(max_bytes=200, max_effective_bits=4.0).judge(SIZES)
    assert (judgement.measure, judgement.observed) == ("effective_bits", 4.25)
    assert "weight_bytes <= 200" in judgement.limit and "effective_bits <= 4" in judgement.limit


def test_size_and_memory_fail_where_nothing_was_measured():
    empty = Facts(source={}, compressed={})
    assert SizeGate(max_ratio=0.5).judge(empty).verdict == "failed"
    assert MemoryGate(max_bytes=10**12).judge(empty).verdict == "failed"
    half = Facts(source={}, compressed={"resident_bytes": 1.0})
    assert MemoryGate(max_bytes=10**12).judge(half).verdict == "failed"


@pytest.mark.parametrize(("what", "total"), [("resident", 120), ("kv_cache", 30), ("serving", 150)])
def test_a_memory_gate_adds_up_what_it_names(what, total):
    assert MemoryGate(what=what, max_bytes=total).judge(SIZES).verdict == "passed"
    assert MemoryGate(what=what, max_bytes=total - 1).judge(SIZES).verdict == "failed"


def test_a_size_gate_without_a_bound_is_refused():
    with pytest.raises(ValidationError, match="judges nothing"):
        SizeGate()
