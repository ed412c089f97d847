"""Perplexity and divergence, against a direct computation by transformers on full logits."""

from __future__ import annotations

import math

import pytest
import torch

from compress.calibration.windows import Windows
from compress.checkpoints.reader import Checkpoint
from compress.evaluation.measure import (
    load_states,
    quick_perplexities,
    save_states,
    score,
    summarise,
    walk_states,
)
from compress.evaluation.specs import Divergence, Perplexity
from compress.evaluation.statistics import mean_interval
from compress.events import Quiet
from compress.gates import Facts, RelativeGate, ThresholdGate, overall
from tests.tiny import CPU, random_model, random_windows, their_logits

ASKED = (Perplexity(data="text", set="text"), Divergence(data="text", set="text"))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Folders of two models that differ a little, and the models."""
    folder = tmp_path_factory.mktemp("pair")
    source = random_model("llama", folder / "source")
    other = random_model("llama", folder / "source2", tie_word_embeddings=False)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    other.save_pretrained(folder / "candidate")
    return folder, source, other


def _measured(folder, windows):
    checkpoints = [Checkpoint(folder / name) for name in ("source", "candidate")]
    sets = {"text": windows}
    states = [walk_states(checkpoint, sets, CPU, torch.float32, 48, Quiet(), "") for checkpoint in checkpoints]
    scores = score((checkpoints[0], states[0]), (checkpoints[1], states[1]), sets, CPU, torch.float32, Quiet())
    return summarise(ASKED, scores)


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("tokens", [24, 64])
def test_measurements_equal_a_direct_computation_on_full_logits(pair, tokens, padded):
    folder, source, candidate = pair
    windows = random_windows(count=5, tokens=tokens, padded=padded)
    log_p, log_q = (their_logits(model, windows)[:, :-1].double().log_softmax(-1) for model in (source, candidate))
    keep = torch.ones(5, tokens - 1, dtype=torch.bool) if windows.mask is None else windows.mask[:, 1:].bool()
    targets = windows.ids[:, 1:, None]
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1)[keep]
    agreement = (log_p.argmax(-1) == log_q.argmax(-1))[keep].double()

    before, after = _measured(folder, windows)

    assert before.values["perplexity.text"] == pytest.approx(_perplexity(log_p, targets, keep), rel=1e-5)
    assert after.values["perplexity.text"] == pytest.approx(_perplexity(log_q, targets, keep), rel=1e-5)
    assert after.values["divergence.text.mean_kl"] == pytest.approx(float(divergence.mean()), rel=1e-3)
    ordered = divergence.sort().values
    assert after.values["divergence.text.median_kl"] == pytest.approx(float(divergence.median()), rel=1e-3)
    for name, fraction in (("kl_p99", 0.99), ("kl_p999", 0.999), ("max_kl", 1.0)):
        expected = float(ordered[math.ceil(fraction * len(ordered)) - 1])
        assert after.values[f"divergence.text.{name}"] == pytest.approx(expected, rel=1e-3)
    assert after.values["divergence.text.top1_agreement"] == pytest.approx(float(agreement.mean()))


def _perplexity(log_probabilities, targets, keep) -> float:
    return float((-log_probabilities.gather(-1, targets).squeeze(-1)[keep]).mean().exp())


def test_a_model_does_not_diverge_from_itself(pair):
    folder, _, _ = pair
    source = Checkpoint(folder / "source")
    windows = random_windows(count=3)
    states = walk_states(source, {"text": windows}, CPU, torch.float32, 48, Quiet(), "")

    scores = score((source, states), (source, states), {"text": windows}, CPU, torch.float32, Quiet())
    _, after = summarise(ASKED, scores)

    assert after.values["divergence.text.max_kl"] == 0
    assert after.values["divergence.text.top1_agreement"] == 1
    assert after.ratio_intervals["perplexity.text"] == (1, 1)


def test_a_model_that_says_nan_fails_every_gate(pair, tmp_path):
    from safetensors.torch import load_file, save_file

    folder, _, _ = pair
    for name in ("source", "candidate"):
        (tmp_path / name).symlink_to(folder / name)
    (tmp_path / "candidate").unlink()
    (tmp_path / "candidate").mkdir()
    (tmp_path / "candidate" / "config.json").write_text((folder / "candidate" / "config.json").read_text())
    tensors = load_file(folder / "candidate" / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, tmp_path / "candidate" / "model.safetensors")

    before, after = _measured(tmp_path, random_windows(count=3))

    assert math.isnan(after.values["perplexity.text"])
    assert math.isnan(after.values["divergence.text.mean_kl"])
    facts = Facts(before.values, after.values, after.intervals, after.ratio_intervals)
    gates = [
        ThresholdGate(measure="divergence.text.mean_kl", max=1e9),
        ThresholdGate(measure="divergence.text.kl_p999", max=1e9),
        ThresholdGate(measure="divergence.text.mean_kl", max=1e9, use_interval=True),
        RelativeGate(measure="perplexity.text", max_ratio=1e9),
        RelativeGate(measure="perplexity.text", min_ratio=1e-9, use_interval=True),
    ]
    assert [gate.judge(facts).verdict for gate in gates] == ["failed"] * len(gates)
    assert overall(gate.judge(facts) for gate in gates) == "failed"


def test_padding_does_not_change_a_windows_measurements(pair):
    folder, _, _ = pair
    whole = random_windows(count=3, tokens=20)
    padded = Windows(
        torch.cat([whole.ids, torch.full((3, 12), 9)], dim=1),
        torch.cat([torch.ones(3, 20), torch.zeros(3, 12)], dim=1).long(),
        whole.ledger,
    )

    (before, after), (before_padded, after_padded) = (_measured(folder, windows) for windows in (whole, padded))

    for measured, other in ((before, before_padded), (after, after_padded)):
        assert other.values == pytest.approx(measured.values, rel=1e-4)


def test_kept_states_are_read_back_and_a_damaged_file_is_no_baseline(pair, tmp_path):
    folder, _, _ = pair
    sets = {"text": random_windows(count=2)}
    states = walk_states(Checkpoint(folder / "source"), sets, CPU, torch.float32, 48, Quiet(), "")
    path = tmp_path / "baseline.safetensors"

    assert load_states(path, sets) is None
    save_states(path, states)
    assert torch.equal(load_states(path, sets)["text"], states["text"])
    path.write_bytes(path.read_bytes()[:100])
    assert load_states(path, sets) is None


@pytest.mark.parametrize("padded", [False, True])
def test_the_health_check_looks_at_the_first_windows(pair, padded):
    folder, source, _ = pair
    windows = random_windows(count=9, padded=padded)
    states = walk_states(Checkpoint(folder / "source"), {"text": windows}, CPU, torch.float32, 48, Quiet(), "")

    found = quick_perplexities(Checkpoint(folder / "source"), states, {"text": windows}, CPU, torch.float32)

    first = windows.first(4)
    log_p = their_logits(source, first)[:, :-1].double().log_softmax(-1)
    keep = torch.ones(4, 23, dtype=torch.bool) if first.mask is None else first.mask[:, 1:].bool()
    assert found["text"] == pytest.approx(_perplexity(log_p, first.ids[:, 1:, None], keep), rel=1e-5)


def test_the_interval_of_equal_windows_is_students():
    means = torch.tensor([1.0, 2.0, 3.0, 4.0])

    mean, (low, high) = mean_interval(means, torch.full((4,), 10))

    reach = 3.182446 * float(means.std()) / 2
    assert mean == 2.5
    assert (low, high) == (pytest.approx(2.5 - reach, rel=1e-5), pytest.approx(2.5 + reach, rel=1e-5))


def test_the_mean_is_weighted_by_tokens():
    mean, _ = mean_interval(torch.tensor([1.0, 4.0]), torch.tensor([30, 10]))

    assert mean == pytest.approx(1.75)


def test_one_window_says_nothing_about_spread():
    assert mean_interval(torch.tensor([1.0]), torch.tensor([5])) == (1.0, (-math.inf, math.inf))


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(400):
        _, (low, high) = mean_interval(torch.randn(12, generator=generator) + 5, torch.full((12,), 7))
        covered += low <= 5 <= high

    assert 0.91 <= covered / 400 <= 0.98
