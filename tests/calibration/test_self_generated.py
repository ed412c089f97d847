"""Text sampled from a model: by its probabilities, in documents, and mixed with text that was read."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import AutoTokenizer

from compress.calibration.draws import tokens_drawn
from compress.calibration.self_generated import sample_windows
from compress.calibration.texts import PythonTopics, SelfGenerated
from compress.calibration.window_specs import CalibrationSpec, WindowSpec
from compress.checkpoints.reader import Checkpoint
from compress.events import Quiet
from tests.tiny import CPU, random_windows


def sampled(glass, **fields):
    source = {key: fields.pop(key) for key in ("document_tokens", "batch_windows") if key in fields}
    spec = WindowSpec(data=SelfGenerated(**source), **{"windows": 6, "window_tokens": 50, **fields})
    tokenizer = AutoTokenizer.from_pretrained(glass)
    return sample_windows(spec, Checkpoint(glass), tokenizer, 7, CPU, Quiet())


def test_tokens_are_drawn_by_their_probabilities():
    probabilities = torch.tensor([0.5, 0.0, 0.2, 0.3])
    drawn = tokens_drawn(probabilities.expand(40_000, 4), torch.Generator().manual_seed(1))
    shares = torch.bincount(drawn.flatten(), minlength=4) / 40_000
    assert shares[1] == 0 and torch.allclose(shares, probabilities, atol=0.01)


def test_a_window_holds_as_many_documents_as_fit_and_each_starts_as_texts_do(glass):
    found = sampled(glass, document_tokens=16)
    assert found.ids.shape == (6, 50) and found.mask is None
    assert found.ledger["documents"] == 24 and found.ledger["windows_obtained"] == 6
    assert len(found.ids.unique(dim=0)) == 6
    assert torch.equal(found.ids, sampled(glass, document_tokens=16).ids)
    bos = AutoTokenizer.from_pretrained(glass).bos_token_id
    if bos is not None:
        assert bool((found.ids[:, ::16] == bos).all())


def test_what_is_sampled_is_likely_to_the_model(glass):
    """Its loss there is near the entropy of its own predictions, and far below that of random tokens."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(glass, dtype=torch.float32)
    ids = sampled(glass, windows=24).ids
    random = torch.randint_like(ids, model.config.vocab_size)
    with torch.no_grad():
        logits = model(ids).logits[:, 1:-1].log_softmax(-1)
        loss = -logits.gather(-1, ids[:, 2:, None]).mean()
        entropy = -(logits.exp() * logits).sum(-1).mean()
        of_random = -model(random).logits[:, 1:-1].log_softmax(-1).gather(-1, random[:, 2:, None]).mean()
    assert abs(loss - entropy) < 0.1 * entropy and of_random > 1.5 * loss


def named(name, **fields):
    """Windows with a ledger such as texts have."""
    found = random_windows(**fields)
    ledger = {**found.ledger, "name": name, "windows_requested": 50, "tokens_requested": 50 * found.ids.shape[1]}
    return replace(found, ledger=ledger)


def test_two_texts_are_mixed_and_any_part_holds_both():
    one, other = named("one", count=48), named("other", count=48, seed=9)
    mixed = one.mixed_with(other, 3)
    ledger = mixed.ledger
    assert (ledger["name"], ledger["windows_requested"], ledger["windows_obtained"]) == ("one + other", 100, 96)
    assert len(mixed.ids) == 96 and mixed.digest not in (one.digest, other.digest)
    rows = {tuple(row.tolist()) for row in one.ids}
    of_one = torch.tensor([tuple(row.tolist()) in rows for row in mixed.ids])
    assert of_one.sum() == 48
    assert all(2 <= int(part.sum()) <= 10 for part in of_one.split(12))
    assert torch.equal(mixed.ids, one.mixed_with(other, 3).ids)


def test_a_padded_text_keeps_its_mask_beside_one_without():
    one = named("one", count=4)
    mask = torch.ones_like(one.ids)
    mask[:, -3:] = 0
    mixed = replace(one, mask=mask).mixed_with(named("other", count=4, seed=9), 0)
    assert mixed.tokens == 2 * one.ids.numel() - 12 == mixed.ledger["tokens_obtained"]


def test_a_sampled_text_takes_no_more_of_its_kind_beside_it():
    for data in ("self-generated", SelfGenerated()):
        with pytest.raises(ValueError, match="take more windows"):
            CalibrationSpec(data=data, self_generated_windows=3)
    spec = CalibrationSpec(data=PythonTopics(), windows=5, window_tokens=64, self_generated_windows=3)
    assert spec.tokens == 8 * 64 and spec.of_text.tokens == 5 * 64 and spec.of_model.windows == 3


def test_of_rows_that_are_not_finite_some_token_is_drawn():
    rows = torch.tensor([[0.2, 0.8, 0.0], [float("nan")] * 3, [0.0, 0.0, 0.0], [float("inf"), 0.0, 0.0]])
    drawn = tokens_drawn(rows, torch.Generator().manual_seed(1))
    assert drawn.shape == (4, 1) and drawn.min() >= 0 and drawn.max() <= 2
