"""Log-likelihoods of continuations by the block walk.

All requests are known before the walk. A request is a context and a continuation; the model reads both but for the
last token, and the continuation's tokens are predicted at its last `len(continuation)` positions:

    context  a b c | x y        reads  a b c x        predicts  x at c, y at x

Attention is causal, so a sequence that another one begins with need not be read again: the choices of an item that are
one token long are all predicted at the same position of one sequence. Sequences are padded on the right, where no real
token sees the padding, so no mask is needed. What is kept of a walk is the final hidden states at the positions that
predict something; logits are formed a few at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.calibration.walk import final_hidden_states
from compress.checkpoints.reader import Checkpoint
from compress.checkpoints.skeleton import Batch, Skeleton
from compress.events import Progress

STATES_BYTES = 1 << 29
"""Hidden states resident in one walk, at most; more sequences are read in several walks."""
LOGITS_AT_ONCE = 64
_WIDTHS = 8
"""Long sequences are padded to multiples of this: few shapes, so that a block's arguments are shared."""


@dataclass(frozen=True)
class Scored:
    """A continuation's log-likelihood in nats, and whether greedy decoding would have written it."""

    loglikelihood: float
    greedy: bool


@dataclass(frozen=True)
class Reading:
    """Sequences that are read, and where each request finds its predictions.

    `places[i]` is (sequence, first position, continuation) of request i.
    """

    sequences: list[tuple[int, ...]]
    places: list[tuple[int, int, tuple[int, ...]]]

    @property
    def tokens(self) -> int:
        return sum(len(sequence) for sequence in self.sequences)


def arrange(requests: Sequence[tuple[list[int], list[int]]]) -> Reading:
    """Sequences for (context, continuation) pairs of token ids, neither empty; longest first, prefixes left out."""
    inputs = [tuple((context + continuation)[:-1]) for context, continuation in requests]
    owner: dict[tuple[int, ...], tuple[int, ...]] = {}
    kept: list[tuple[int, ...]] = []
    # In lexicographic order a sequence stands right before those that begin with it.
    for sequence in sorted(set(inputs), reverse=True):
        if kept and kept[-1][: len(sequence)] == sequence:
            owner[sequence] = kept[-1]
        else:
            kept.append(sequence)
            owner[sequence] = sequence
    kept.sort(key=lambda sequence: (-len(sequence), sequence))
    number = {sequence: index for index, sequence in enumerate(kept)}
    places = [
        (number[owner[sequence]], len(context) - 1, tuple(continuation))
        for sequence, (context, continuation) in zip(inputs, requests, strict=True)
    ]
    return Reading(kept, places)


@torch.no_grad()
def score_requests(
    checkpoint: Checkpoint,
    requests: Sequence[tuple[list[int], list[int]]],
    device: torch.device,
    dtype: torch.dtype,
    tokens_at_once: int,
    progress: Progress,
    label: str,
) -> list[Scored]:
    """Score (context, continuation) pairs of token ids. Raises ValueError where a half is empty."""
    if any(not context or not continuation for context, continuation in requests):
        raise ValueError("a request needs a token of context and a token of continuation")
    reading = arrange(requests)
    skeleton = Skeleton(checkpoint.config, device, dtype)
    wanted = _wanted(reading)
    states: dict[tuple[int, int], Tensor] = {}
    for part in _walks(reading, int(skeleton.config.hidden_size) * dtype.itemsize):
        batches = list(_batches(reading, part, tokens_at_once))
        hidden = final_hidden_states(skeleton, checkpoint, [batch for _, batch in batches], progress, label)
        for (numbers, _), block in zip(batches, hidden, strict=True):
            for row, sequence in enumerate(numbers):
                positions = wanted[sequence]
                rows = block[row, positions].float().cpu()
                states.update({(sequence, position): rows[at] for at, position in enumerate(positions)})
    return _scores(checkpoint, skeleton, reading, states, progress)


def _wanted(reading: Reading) -> list[list[int]]:
    """Positions of each sequence whose states predict something."""
    positions: list[set[int]] = [set() for _ in reading.sequences]
    for sequence, first, continuation in reading.places:
        positions[sequence].update(range(first, first + len(continuation)))
    return [sorted(found) for found in positions]


def _walks(reading: Reading, bytes_per_token: int) -> Iterator[range]:
    """Runs of sequences whose padded states fit in STATES_BYTES."""
    start, held = 0, 0
    for index, sequence in enumerate(reading.sequences):
        size = _padded(len(sequence)) * bytes_per_token
        if held and held + size > STATES_BYTES:
            yield range(start, index)
            start, held = index, 0
        held += size
    if start < len(reading.sequences):
        yield range(start, len(reading.sequences))


def _batches(reading: Reading, part: range, tokens_at_once: int) -> Iterator[tuple[list[int], Batch]]:
    """Sequences of like length together, about `tokens_at_once` padded tokens a batch."""
    start = part.start
    while start < part.stop:
        width = _padded(len(reading.sequences[start]))
        stop = min(part.stop, start + max(1, tokens_at_once // width))
        ids = torch.zeros(stop - start, width, dtype=torch.int64)
        for row, sequence in enumerate(reading.sequences[start:stop]):
            ids[row, : len(sequence)] = torch.tensor(sequence)
        # The last batch of a walk may hold short sequences only.
        longest = max(len(sequence) for sequence in reading.sequences[start:stop])
        yield list(range(start, stop)), Batch(ids[:, : min(width, _padded(longest))])
        start = stop


def _padded(length: int) -> int:
    """Short sequences are padded to no multiple: it would double their work."""
    if length <= 4 * _WIDTHS:
        return length
    return -(-length // _WIDTHS) * _WIDTHS


def _scores(
    checkpoint: Checkpoint,
    skeleton: Skeleton,
    reading: Reading,
    states: dict[tuple[int, int], Tensor],
    progress: Progress,
) -> list[Scored]:
    """Sum the log-probabilities of every request's tokens; each state's logits are formed once."""
    rows = {place: index for index, place in enumerate(states)}
    pairs = [
        (rows[sequence, first + step], target, request)
        for request, (sequence, first, continuation) in enumerate(reading.places)
        for step, target in enumerate(continuation)
    ]
    state, target, request = torch.tensor(sorted(pairs)).T
    sums = torch.zeros(len(reading.places), dtype=torch.float64)
    greedy = torch.ones(len(reading.places), dtype=torch.bool)
    hidden = torch.stack(list(states.values()))
    with skeleton.head(checkpoint) as head, progress.task("answers", len(hidden)) as advance:
        for start in range(0, len(hidden), LOGITS_AT_ONCE):
            logits = head.logits(hidden[start : start + LOGITS_AT_ONCE].to(skeleton.device))
            likely, log_p = logits.argmax(-1).cpu(), logits.log_softmax(-1).cpu()
            here = (state >= start) & (state < start + LOGITS_AT_ONCE)
            at, to, who = state[here] - start, target[here], request[here]
            sums.index_add_(0, who, log_p[at, to].double())
            greedy[who[likely[at] != to]] = False
            for _ in range(len(logits)):
                advance("")
    return [Scored(float(total), bool(same)) for total, same in zip(sums, greedy, strict=True)]
