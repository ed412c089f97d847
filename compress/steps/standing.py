"""Channels that lead to a version today and how it was served, read from the store: its report never changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from compress.artifacts import desk
from compress.artifacts.channels import CHANNELS, read
from compress.artifacts.store import Store
from compress.errors import CompressError
from compress.reports.standing import ChannelMark, Served, Standing, Waiver

SERVING = "serving"


def standing_of(store: Store, name: str, label: str) -> Standing:
    """Where version `label` of `name` stands."""
    marks = [mark for version, mark in channels(store, name) if version == label]
    return Standing(tuple(marks), tuple(waivers(store, name, label)), served(store, name, label))


def served(store: Store, name: str, label: str) -> Served | None:
    """What scripts/serve_vllm.py kept beside the version, if it was run. Raises CompressError for another's file."""
    path = store.root / name / SERVING / f"{label}.json"
    if not path.is_file():
        return None
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        return Served(
            runtime=f"vLLM {facts['versions']['vllm']}",
            device=str(facts["device"]),
            prompts=int(facts["prompts"]),
            mean_difference=float(facts["mean_abs_logprob_difference"]),
            largest_difference=float(facts["largest_logprob_difference"]),
            same_token=float(facts["same_most_likely_token"]),
            perplexity_ratio=float(facts["perplexity_ratio"]),
            tokens_per_second=float(facts["output_tokens_per_second"]),
            device_bytes=_bytes(facts, "device_bytes_in_use"),
            resident_bytes=_bytes(facts, "peak_resident_bytes"),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CompressError(
            f"{path}: not what serving was measured as ({error!r}); remove it or serve again"
        ) from error


def _bytes(facts: dict[str, Any], key: str) -> int | None:
    return int(facts[key]) if key in facts else None


def standing_at(folder: Path, name: str, label: str) -> Standing:
    """The same for an artifact named by its folder; a copy that lies in no store stands nowhere."""
    store = store_of(folder, name, label)
    return Standing() if store is None else standing_of(store, name, label)


def store_of(folder: Path, name: str, label: str) -> Store | None:
    """The store in which a folder is version `label` of `name`; None where it is a copy somewhere else."""
    inside = Path(name, "rejected", label) if label.startswith("r") else Path(name, label)
    place, above = folder.resolve(), len(inside.parts) - 1
    if len(place.parents) <= above or place.relative_to(place.parents[above]) != inside:
        return None
    return Store(place.parents[above])


def channels(store: Store, name: str) -> list[tuple[str, ChannelMark]]:
    """(version, channel that leads to it) of every channel of `name`.

    Raises CompressError for a channel's file that is damaged: nobody may take it for no channel.
    """
    found = []
    for channel in CHANNELS:
        held = read(store.home(name), channel)
        if held is not None:
            found.append((held.version, ChannelMark(channel, held.since.isoformat(), held.by)))
    return found


def waivers(store: Store, name: str, label: str) -> list[Waiver]:
    """Every waiver that a version was ever given, and whether it counts today."""
    given = store.waivers(name, label)
    if not given:
        return []
    counting = {waiver.line for waiver in desk.counting(store, name, label)}
    return [
        Waiver(
            waiver.who,
            waiver.reason,
            waiver.until.date().isoformat(),
            waiver.gates,
            waiver.signed_by or "",
            counts=waiver.line in counting,
            over=waiver.expired(),
        )
        for waiver in given
    ]
