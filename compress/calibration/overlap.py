"""Do two sets of windows share text? Measured as the share of evaluation n-grams that calibration also holds.

n = 13 tokens, the length used for contamination checks since the GPT-3 paper (arXiv 2005.14165, appendix C). Some
shared boilerplate is normal; a set evaluated on its own calibration text scores near 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

NGRAM = 13
SHORTEST = 8
"""Tokens of a question that says anything: shorter ones occur by chance."""
LIMIT = 0.02
"""Above this share of shared n-grams the evaluation is refused."""


def ngram_hashes(ids: Tensor, n: int = NGRAM) -> np.ndarray:
    """Sorted unique 64-bit hashes of the n-grams inside each window; ids (windows, tokens) int64."""
    if ids.shape[1] < n:
        return np.empty(0, dtype=np.uint64)
    return np.unique(_hashes(ids.numpy(), n))


def _hashes(ids: np.ndarray, n: int) -> np.ndarray:
    """Hashes of the n-grams that begin at each place of each row; ids (rows, tokens) -> (rows, tokens - n + 1)."""
    tokens = ids.astype(np.uint64)
    hashes = np.zeros((tokens.shape[0], tokens.shape[1] - n + 1), dtype=np.uint64)
    multiplier = np.uint64(6364136223846793005)
    with np.errstate(over="ignore"):
        for offset in range(n):
            hashes = hashes * multiplier + tokens[:, offset : offset + hashes.shape[1]] + np.uint64(1442695040888963407)
    return hashes


def shared_fraction(calibration: Tensor, evaluation: Tensor) -> float:
    """Share of the evaluation windows' distinct n-grams that occur in calibration windows, 0 to 1.

    Windows shorter than n tokens have no n-grams; then whole windows are compared.
    """
    theirs = ngram_hashes(evaluation)
    if not len(theirs):
        rows = {tuple(row) for row in calibration.tolist()}
        return sum(tuple(row) in rows for row in evaluation.tolist()) / max(1, len(evaluation))
    return float(np.isin(theirs, ngram_hashes(calibration), assume_unique=True).mean())


def shared_fraction_of_questions(calibration: Tensor, questions: Sequence[Sequence[int]]) -> float:
    """Share of the questions' distinct n-grams that occur in calibration windows, 0 to 1.

    calibration (windows, tokens) int64; questions are token ids of any length. Of a question with fewer than n tokens
    the whole is compared, and with fewer than SHORTEST it is left out; 0 where none is left.
    """
    by_length: dict[int, list[np.ndarray]] = {}
    for question in questions:
        n = min(NGRAM, len(question))
        if n >= SHORTEST:
            by_length.setdefault(n, []).append(_hashes(np.array([question]), n)[0])
    found = total = 0
    for n, parts in by_length.items():
        theirs = np.unique(np.concatenate(parts))
        found += int(np.isin(theirs, ngram_hashes(calibration, n), assume_unique=True).sum())
        total += len(theirs)
    return found / total if total else 0.0
