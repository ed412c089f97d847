"""Where a version stands today: channels that lead to it, and waivers of its gates.

Neither is in report.json, which never changes once it is published: whoever shows a report reads them anew.
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


@dataclass(frozen=True)
class Standing:
    """Both, as they are when a report is shown."""

    channels: tuple[ChannelMark, ...] = ()
    waivers: tuple[Waiver, ...] = ()

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
    if standing.waivers:
        gates = dict.fromkeys(gate for waiver in standing.waivers for gate in waiver.gates)
        said.append(f"Waived, not passed: {', '.join(gates) or 'no gate by name'}.")
    return said


def waivers_table(standing: Standing) -> Table:
    rows = [
        (
            ", ".join(waiver.gates) or MISSING,
            waiver.who or MISSING,
            waiver.reason or MISSING,
            waiver.until or MISSING,
            waiver.signed_by or MISSING,
        )
        for waiver in standing.waivers
    ]
    return Table("Waivers", ("Gates", "Waived by", "Reason", "Until", "Signed by"), "lllll", rows)
