"""May this version be released? Yes if it passed, or if waivers that count cover every gate that did not."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from compress.artifacts import waivers
from compress.artifacts.history import History
from compress.artifacts.layout import Version
from compress.artifacts.manifest import Manifest
from compress.artifacts.waivers import VERDICT, Waiver
from compress.errors import RefusedError


def counting_waivers(root: Path, past: History, version: Version, found: Manifest, now: datetime) -> list[Waiver]:
    """The waivers that let this version be released. Raises RefusedError, with every gate that none covers.

    A version that passed needs none. What does not count, and why, is part of the message.
    """
    if found.verdict == "passed":
        return []
    needed = {each.key: each.sentence for each in waivers.gates_not_passed(version.path) if each.decisive}
    needed = needed or {VERDICT: f"The verdict is {found.verdict}."}
    signers = waivers.signers_of(root)
    counting: list[Waiver] = []
    why_not: list[str] = []
    for waiver in waivers.of_history(past, version.label):
        reason = waivers.covers(waiver, found.digest, signers, now)
        if reason:
            why_not.append(f"The waiver of {', '.join(waiver.gates)} by {waiver.who} {reason}.")
        else:
            counting.append(waiver)
    open_gates = sorted(set(needed) - {gate for waiver in counting for gate in waiver.gates})
    if open_gates:
        raise RefusedError(_refusal(version, found, [needed[key] for key in open_gates], open_gates, why_not))
    return counting


def _refusal(version: Version, found: Manifest, sentences: list[str], gates: list[str], why_not: list[str]) -> str:
    flags = " ".join(f"--gate {key}" for key in gates)
    remedy = f"compress waive {version.name} {version.label} {flags} --reason TEXT --until DATE"
    return "\n".join(
        [
            f"{version.reference}: its verdict is {found.verdict}, and no waiver that holds covers {', '.join(gates)}.",
            *sentences,
            *why_not,
            f"To release it all the same, somebody answers for it: {remedy}",
        ]
    )
