"""What `smoothquant`, `awq` and `kv_cache` did, in a line for each kind of place instead of one for each block."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from statistics import median
from typing import Any


def summary(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Facts of a stage with their lists over blocks summed up; others as they are."""
    found = {key: value for key, value in facts.items() if key not in ("places", "largest")}
    by_writer: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for place in facts.get("places", ()):
        by_writer[str(place["writer"])].append(place)
    for writer, places in by_writer.items():
        alphas = [place["alpha"] for place in places if place["alpha"] is not None]
        said = f"scaled in {len(alphas)} of {len(places)} blocks"
        if alphas:
            ratio = median(place["error_ratio"] for place in places)
            said += f", median alpha {median(alphas):.2g}, error of rounded outputs {ratio:.2f} times as large"
        found[writer] = said
    for side in ("keys", "values"):
        sizes = [entry[side] for entry in facts.get("largest", ())]
        if sizes:
            found[f"largest {side}"] = f"{min(sizes):.3g} to {max(sizes):.3g}, by block"
    return found
