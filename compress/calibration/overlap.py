"""Do two sets of windows share text? Measured as the share of evaluation n-grams that calibration also holds.

n = 13 tokens, the length used for contamination checks since the GPT-3 paper (arXiv 2005.14165, appendix C). Some
shared boilerplate is normal; a set evaluated on its own calibration text scores near 1.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

NGRAM = 13
LIMIT = 0.02
"""Above this share of shared n-grams the evaluation is refused."""


def ngram_hashes(ids: Tensor, n: int = NGRAM) -> np.ndarray:
    """Sorted unique 64-bit hashes of the n-grams inside each window; ids (windows, tokens) int64."""
    tokens = ids.numpy().astype(np.uint64)
    if tokens.shape[1] < n:
        return np.empty(0, dtype=np.uint64)
    hashes = np.zeros((tokens.shape[0], tokens.shape[1] - n + 1), dtype=np.uint64)
    multiplier = np.uint64(6364136223846793005)
    with np.errstate(over="ignore"):
        for offset in range(n):
            hashes = hashes * multiplier + tokens[:, offset : offset + hashes.shape[1]] + np.uint64(1442695040888963407)
    return np.unique(hashes)


def shared_fraction(calibration: Tensor, evaluation: Tensor) -> float:
    """Share of the evaluation windows' distinct n-grams that occur in calibration windows, 0 to 1.

    Windows shorter than n tokens have no n-grams; then whole windows are compared.
    """
    theirs = ngram_hashes(evaluation)
    if not len(theirs):
        rows = {tuple(row) for row in calibration.tolist()}
        return sum(tuple(row) in rows for row in evaluation.tolist()) / max(1, len(evaluation))
    return float(np.isin(theirs, ngram_hashes(calibration), assume_unique=True).mean())
