"""Scores of two models on the same units: what every comparison with noise in it is made from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Unit = Literal["items", "windows"]


@dataclass(frozen=True)
class Paired:
    """Both models' scores on the same units, in the same order. Units are independent of each other; what is inside
    one (the tokens of a window) is not."""

    unit: Unit
    ids: tuple[str, ...]
    source: NDArray[np.float64]
    """(units,) a window's mean loss in nats, or 1 where an item was answered right and 0 where not."""
    compressed: NDArray[np.float64]
    """(units,) the same of the compressed model. For a divergence: its mean in the window, `source` being 0."""
    weights: NDArray[np.float64]
    """(units,) how much a unit counts: tokens of a window, 1 for an item."""

    def __len__(self) -> int:
        return len(self.ids)
