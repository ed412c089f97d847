"""The block walk's log-likelihoods against one plain forward per request, whatever is shared, padded or cut."""

from __future__ import annotations

import pytest
import torch

from compress.checkpoints.reader import Checkpoint
from compress.evaluation.tasks import likelihood
from compress.evaluation.tasks.likelihood import arrange, score_requests
from compress.events import Quiet
from tests.tiny import CPU, VOCABULARY, random_model


def requests(count: int = 24) -> list[tuple[list[int], list[int]]]:
    """Contexts of 1 to 40 tokens with continuations of 1 to 4; every second shares the context before it."""
    generator = torch.Generator().manual_seed(3)

    def ids(length: int) -> list[int]:
        return torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()

    made: list[tuple[list[int], list[int]]] = []
    for number in range(count):
        context = made[-1][0] if number % 2 else ids(1 + 39 * number // count)
        made.append((context, ids(1 + number % 4)))
    return made


@torch.no_grad()
def plainly(model, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    logits = model(torch.tensor([context + continuation[:-1]])).logits[0, len(context) - 1 :].float()
    log_p = logits.log_softmax(-1)
    total = sum(float(log_p[step, token]) for step, token in enumerate(continuation))
    return total, logits.argmax(-1).tolist() == continuation


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "gemma3_text", "mistral", "phi3", "qwen2"])
@pytest.mark.parametrize("tokens_at_once", [16, 300])
def test_every_request_scores_as_in_a_forward_of_its_own(tmp_path, name, tokens_at_once):
    model = random_model(name, tmp_path)
    asked = requests()
    scored = score_requests(Checkpoint(tmp_path), asked, CPU, torch.float32, tokens_at_once, Quiet(), "")
    for one, request in zip(scored, asked, strict=True):
        total, greedy = plainly(model, *request)
        assert one.loglikelihood == pytest.approx(total, abs=1e-4)
        assert one.greedy == greedy


def test_several_walks_give_what_one_gives(tmp_path, monkeypatch):
    random_model("llama", tmp_path)
    arguments = (Checkpoint(tmp_path), requests(), CPU, torch.float32, 64, Quiet(), "")
    whole = score_requests(*arguments)
    monkeypatch.setattr(likelihood, "STATES_BYTES", 64 * 4 * 50)
    parts = score_requests(*arguments)
    assert [one.loglikelihood for one in parts] == pytest.approx([one.loglikelihood for one in whole], abs=1e-5)
    assert [one.greedy for one in parts] == [one.greedy for one in whole]


def test_greedy_is_true_for_what_the_model_would_write(tmp_path):
    model = random_model("llama", tmp_path)
    context = [5, 9, 77]
    written = []
    for _ in range(3):
        with torch.no_grad():
            written.append(int(model(torch.tensor([context + written])).logits[0, -1].argmax()))
    other = [*written[:2], (written[2] + 1) % VOCABULARY]
    asked = [(context, written), (context, other)]
    scored = score_requests(Checkpoint(tmp_path), asked, CPU, torch.float32, 64, Quiet(), "")
    assert [one.greedy for one in scored] == [True, False]


def test_a_sequence_that_another_begins_with_is_not_read():
    reading = arrange([([1, 2], [3]), ([1, 2], [4]), ([1, 2], [5, 6, 7]), ([9], [1]), ([1, 2], [5, 6, 8])])
    assert reading.sequences == [(1, 2, 5, 6), (9,)]
    assert reading.places == [(0, 1, (3,)), (0, 1, (4,)), (0, 1, (5, 6, 7)), (1, 0, (1,)), (0, 1, (5, 6, 8))]
    assert reading.tokens == 5


def test_an_empty_half_is_refused(tmp_path):
    random_model("llama", tmp_path)
    with pytest.raises(ValueError, match="a token of context"):
        score_requests(Checkpoint(tmp_path), [([1], [])], CPU, torch.float32, 64, Quiet(), "")
