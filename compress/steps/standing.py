"""Channels that lead to a version today and how it was served, read from the store: its report never changes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from compress.artifacts.store import Store
from compress.errors import CompressError
from compress.reports.standing import ChannelMark, Served, Standing, Waiver

CHANNELS = "channels"
SERVING = "serving"


def standing_of(store: Store, name: str, label: str, waivers: Sequence[Waiver] = ()) -> Standing:
    """Where version `label` of `name` stands. `waivers`: those of the version that hold today."""
    marks = [mark for version, mark in channels(store, name) if version == label]
    return Standing(tuple(marks), tuple(waivers), served(store, name, label))


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
            device_bytes=int(facts["device_bytes_in_use"]),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CompressError(
            f"{path}: not what serving was measured as ({error!r}); remove it or serve again"
        ) from error


def standing_at(folder: Path, name: str, label: str) -> Standing:
    """The same for an artifact named by its folder; a copy that lies in no store stands nowhere."""
    parents = folder.resolve().parents
    home = parents[1] if label.startswith("r") else parents[0]
    inside = folder.resolve().relative_to(home.parent).as_posix()
    if inside != f"{name}/{f'rejected/{label}' if label.startswith('r') else label}":
        return Standing()
    return standing_of(Store(home.parent), name, label)


def channels(store: Store, name: str) -> list[tuple[str, ChannelMark]]:
    """(version, channel that leads to it) of every channel of `name`, by the channel's name.

    Raises CompressError for a channel's file that is no JSON object with a version: nobody may take it for no channel.
    """
    folder = store.root / name / CHANNELS
    paths = sorted(path for path in folder.glob("*.json") if path.is_file()) if folder.is_dir() else []
    return [_read(path) for path in paths]


def _read(path: Path) -> tuple[str, ChannelMark]:
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        version = str(facts["version"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = type(error).__name__
        raise CompressError(f"{path}: no channel can be read from it ({why}); promote a version again") from error
    return version, ChannelMark(path.stem, str(facts.get("since") or ""), str(facts.get("by") or ""))
