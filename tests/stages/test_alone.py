"""What a group of linears costs alone: the same as walking the whole changed model, whatever walks together."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from compress.checkpoints.candidates import Assigned, alone_records, candidates_in
from compress.checkpoints.reader import Checkpoint
from compress.checkpoints.skeleton import Skeleton
from compress.quantization.scheme import Scheme
from compress.stages import MixedPrecision, Sensitivity, alone
from compress.stages.choices import Choices
from compress.stages.tuning import TuningText
from tests.tiny import CPU, apply_stage, random_model, random_windows, stage_context

WINDOWS = random_windows(count=24)
FIELDS = {"candidates": (2, 3, 4, 8), "group_size": 32, "tuning_windows": 4}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    random_model("llama", folder)
    return folder


@pytest.fixture(scope="module")
def solved(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sensitivity") / "out"
    apply_stage(Sensitivity(**FIELDS), model, folder, WINDOWS)
    return folder


def schemes_in(folder):
    return {
        module: [Scheme.from_json(each["scheme"]) for each in rows] for module, rows in candidates_in(folder, 2).items()
    }


def units_of(folder):
    source = Checkpoint(folder)
    skeleton = Skeleton(source.config, CPU, torch.float32)
    return Sensitivity(**FIELDS).units(skeleton.architecture, skeleton.linear_shapes())


@pytest.mark.parametrize("kept_bytes", [1, 2**30], ids=["one at a time", "all together"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_it_is_the_divergence_of_the_whole_changed_model(solved, model, tmp_path, monkeypatch, kept_bytes, padded):
    monkeypatch.setattr(alone, "KEPT_BYTES", kept_bytes)
    monkeypatch.setattr(alone, "DRAWS", 2**16)
    text, schemes, done = random_windows(count=3, seed=4, padded=padded), schemes_in(solved), []
    context = stage_context(solved, tmp_path / "out", WINDOWS, origin=model)
    tried = [alone.Tried(unit, number) for number, unit in zip((0, 2, 1, 3, 0, 1, 2, 3), units_of(solved), strict=True)]
    found = {}
    for part in alone.divergences_alone(context, solved, schemes, tried, text, done.append):
        assert len(part) == (1 if kept_bytes == 1 else 8)
        found |= part
    assert sorted(done) == sorted(found) == sorted(each.unit.name for each in tried)
    judge = TuningText(context, text)
    for each in tried:
        changed = Assigned(solved, schemes, dict.fromkeys(each.unit.modules, each.number))
        assert found[each.unit.name] == pytest.approx(judge.judge(changed).kl, rel=0.01), each.unit.name


@pytest.mark.parametrize("name", ["gemma2", "gpt2"])
def test_a_few_drawn_tokens_tell_the_divergence(tmp_path, name):
    """Of heads with a soft cap, and with a bias: random states, 512 tokens a position in place of the vocabulary."""
    random_model(name, tmp_path / "model")
    source = Checkpoint(tmp_path / "model")
    generator = torch.Generator().manual_seed(0)
    with Skeleton(source.config, CPU, torch.float32).head(source) as head:
        head = replace(head, bias=torch.randn(len(head.weight), generator=generator))
        wanted = torch.randn(200, head.weight.shape[1], generator=generator)
        found = {
            str(far): wanted + far * torch.randn(wanted.shape, generator=generator) for far in (0.0, 0.01, 0.1, 1.0)
        }
        measured = alone._divergences(head, wanted, found, seed=1)
        log_p = head.logits(wanted).log_softmax(-1)
        for far, states in found.items():
            exact = float((log_p.exp() * (log_p - head.logits(states).log_softmax(-1))).sum(-1).mean())
            assert measured[far] == pytest.approx(exact, rel=0.03, abs=1e-7), far


def test_costs_agree_with_it_at_the_candidate_that_was_measured(solved, model, tmp_path):
    context = stage_context(solved, tmp_path / "out", WINDOWS, origin=model)
    choices = Choices(MixedPrecision(**FIELDS, budget={"effective_bits": 4}), context, tmp_path / "measured.json")
    found, plain = alone_records(solved), candidates_in(solved, 2)
    assert {number for number, _ in found.values()} == {1}, "3 bits, where there are fewer as well"
    for unit, row in zip(choices.units, choices.costs, strict=True):
        number, kl = found[unit.name]
        predicted = [sum(plain[module][k]["cost"] for module in unit.modules) for k in range(4)]
        assert row[number] == pytest.approx(kl)
        assert row == pytest.approx([cost * kl / predicted[number] for cost in predicted])


def test_it_can_be_left_out(solved, model, tmp_path):
    _, outcome = apply_stage(Sensitivity(**FIELDS, alone_tokens=0), model, tmp_path / "out", WINDOWS)
    assert "alone_tokens" not in outcome.facts and alone_records(tmp_path / "out") == {}
    context = stage_context(tmp_path / "out", tmp_path / "next", WINDOWS, origin=model)
    choices = Choices(MixedPrecision(**FIELDS, budget={"effective_bits": 4}), context, tmp_path / "measured.json")
    plain = candidates_in(tmp_path / "out", 2)
    assert choices.costs[0][2] == sum(plain[module][2]["cost"] for module in choices.units[0].modules)


def test_units_that_were_measured_before_a_kill_are_not_measured_again(solved, model, tmp_path, monkeypatch):
    monkeypatch.setattr(alone, "KEPT_BYTES", 1)
    measured, original = [], alone._together

    def counted(context, skeleton, kept, schemes, tried, windows):
        if len(measured) == 3:
            measured.append("")
            raise KeyboardInterrupt
        measured.extend(each.unit.name for each in tried)
        return original(context, skeleton, kept, schemes, tried, windows)

    monkeypatch.setattr(alone, "_together", counted)
    context = stage_context(model, tmp_path / "out", WINDOWS)
    with pytest.raises(KeyboardInterrupt):
        Sensitivity(**FIELDS).apply(context)
    outcome = Sensitivity(**FIELDS).apply(context)
    names = [name for name in measured if name]
    assert len(names) == len(set(names)) == 8
    found, whole = alone_records(tmp_path / "out"), alone_records(solved)
    assert found.keys() == whole.keys()
    for name, (number, kl) in whole.items():
        assert found[name] == (number, pytest.approx(kl, rel=1e-4))
    assert outcome.facts["measured_alone_at"] == "int3 symmetric group 32" and outcome.facts["alone_tokens"] > 0


@pytest.mark.parametrize(
    ("fields", "number"),
    [
        ({}, 1),
        ({"runtime": "llama.cpp"}, 0),
        ({"candidates": (2, {"bits": 8, "inputs": "int8"}, 16)}, 0),
        ({"candidates": ({"bits": 8, "inputs": "int8"}, 16)}, None),
        ({"alone_tokens": 0}, None),
    ],
)
def test_the_candidate_has_three_bits_or_a_few_more(fields, number):
    assert Sensitivity(**fields).tried_alone == number


def test_a_factor_has_bounds_and_needs_two_positive_numbers():
    assert [alone.factor(*pair) for pair in ((3.0, 2.0), (0.0, 1.0), (1.0, 0.0), (100.0, 1.0), (1e-9, 1.0))] == [
        1.5,
        1.0,
        1.0,
        alone.TRUSTED,
        1 / alone.TRUSTED,
    ]
    pairs = ((3.0, 2.0), (1.0, 0.0), (0.0, 1.0), (100.0, 1.0), (1e-9, 1.0), (float("nan"), 1.0), (float("inf"), 1.0))
    assert [alone.held_back(*pair) for pair in pairs] == [False, False, True, True, True, True, True]


def test_a_measurement_that_is_not_followed_is_told(model, tmp_path, monkeypatch):
    original = alone._divergences

    def broken(head, wanted, found, seed):
        return dict.fromkeys(original(head, wanted, found, seed), float("nan"))

    monkeypatch.setattr(alone, "_divergences", broken)
    _, outcome = apply_stage(Sensitivity(**FIELDS), model, tmp_path / "out", WINDOWS)
    assert [event.kind for event in outcome.events] == ["alone_held_back"] * 8
    assert outcome.facts["median_factor"] == 1.0


def test_few_tokens_are_the_beginnings_of_several_windows():
    text = random_windows(count=24)
    width = text.ids.shape[1]
    few = alone.few_tokens(text, 3 * width)
    assert few.ids.shape == (3, width) and torch.equal(few.ids, text.ids[:3])
    assert len(alone.few_tokens(text, 1).ids) == 1
