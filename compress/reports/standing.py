"""Where a version stands today: channels that lead to it, waivers of its gates, and how a runtime served it.

None is in report.json, which never changes once it is published: whoever shows a report reads them anew.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from compress.reports.tables import Table
from compress.reports.words import MISSING


@dataclass(frozen=True)
class ChannelMark:
    """A channel that leads to the version. `since` is ISO 8601, `by` whoever promoted it."""

    channel: str
    since: str
    by: str


@dataclass(frozen=True)
class Waiver:
    """Somebody's word that the version may be used although `gates` (measures) did not pass. `until` is a date."""

    who: str
    reason: str
    until: str
    gates: tuple[str, ...]
    signed_by: str
    counts: bool = True
    """Whether it holds today: not over, and signed where the store asks for that."""
    over: bool = False


@dataclass(frozen=True)
class Served:
    """What scripts/serve_vllm.py found: a runtime's log-probabilities against those of transformers on the same files,
    in nats a token, over `prompts`; tokens a second with all of them at once. Bytes in use of a GPU, or, on a CPU, the
    most that were resident in the process."""

    runtime: str
    device: str
    prompts: int
    mean_difference: float
    largest_difference: float
    same_token: float
    perplexity_ratio: float
    tokens_per_second: float
    device_bytes: int | None = None
    resident_bytes: int | None = None


@dataclass(frozen=True)
class Standing:
    """All of it, as it is when a report is shown."""

    channels: tuple[ChannelMark, ...] = ()
    waivers: tuple[Waiver, ...] = ()
    served: Served | None = None

    @property
    def waived(self) -> bool:
        """Whether a waiver counts today."""
        return any(waiver.counts for waiver in self.waivers)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


NOTHING = Standing()
"""Of a version that no channel leads to, with no gate waived; and of one that is only just being published."""


def sentences(standing: Standing) -> list[str]:
    """One for each channel; one that says that gates were waived, if any were."""
    said = [
        f"In channel {mark.channel} since {mark.since or 'an unknown time'}{f', by {mark.by}' if mark.by else ''}."
        for mark in standing.channels
    ]
    held = [waiver for waiver in standing.waivers if waiver.counts]
    if held:
        gates = dict.fromkeys(gate for waiver in held for gate in waiver.gates)
        said.append(f"Waived, not passed: {', '.join(gates) or 'no gate by name'}.")
    if standing.served is not None:
        said.append(_served(standing.served))
    return said


def _served(served: Served) -> str:
    memory = [
        f", {count / 2**30:.1f} GiB of {what}"
        for count, what in (
            (served.device_bytes, "device memory"),
            (served.resident_bytes, "resident memory at the process's peak"),
        )
        if count is not None
    ]
    return (
        f"Served with {served.runtime} on {served.device}: over {served.prompts} prompts log-probabilities differ from "
        f"transformers' by {served.mean_difference:.2g} nats a token ({served.largest_difference:.2g} at most), the "
        f"most likely token is the same in {100 * served.same_token:.1f} % of places, perplexity is "
        f"{served.perplexity_ratio:.4g} times as high; {served.tokens_per_second:,.0f} tokens a second"
        f"{''.join(memory)}."
    )


def _state(waiver: Waiver) -> str:
    return " (over)" if waiver.over else "" if waiver.counts else " (does not count)"


def waivers_table(standing: Standing) -> Table:
    rows = [
        (
            ", ".join(waiver.gates) or MISSING,
            waiver.who or MISSING,
            waiver.reason or MISSING,
            f"{waiver.until or MISSING}{_state(waiver)}",
            waiver.signed_by or MISSING,
        )
        for waiver in standing.waivers
    ]
    return Table("Waivers", ("Gates", "Waived by", "Reason", "Until", "Signed by"), "lllll", rows)
