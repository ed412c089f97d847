"""May this version be released? Yes if it is whole and the one that the history recorded, and if it passed, or waivers
that count cover every gate that did not."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from compress.artifacts import manifest, waivers
from compress.artifacts.history import History
from compress.artifacts.layout import Version
from compress.artifacts.manifest import Manifest
from compress.artifacts.verify import check_sizes, verify
from compress.artifacts.waivers import VERDICT, Waiver
from compress.artifacts.words import visible, visible_row
from compress.errors import CompressError, RefusedError


@dataclass(frozen=True)
class Cover:
    """What waivers do for a version now. `needed`: the sentence of every decisive gate that did not pass, by key."""

    needed: dict[str, str]
    counting: tuple[Waiver, ...]
    why_not: tuple[str, ...]
    """A sentence for each waiver of the version that does not count."""

    @property
    def open_gates(self) -> list[str]:
        """The gates that no waiver that counts covers."""
        return sorted(set(self.needed) - {gate for waiver in self.counting for gate in waiver.gates})


def whole(version: Version, quick: bool) -> Manifest:
    """The manifest of a version that is as it was published. Raises CompressError naming everything that is not."""
    result = check_sizes(version.path) if quick else verify(version.path)
    if not result.ok:
        raise CompressError(
            "\n".join([f"{version.reference} is damaged and stays where it is:", *visible_row(result.problems)])
        )
    return manifest.read(version.path)


def refuse_unrecorded(past: History, reference: str, found: Manifest, damaged_too: bool = False) -> None:
    """Raises CompressError when a version is not what the history says was made under its label.

    `damaged_too`: where the history is damaged, a version of which no line tells is let through.
    """
    line = past.made().get(found.version)
    if line is None and not (damaged_too and past.problems):
        raise CompressError(f"{reference}: no line of the history tells of it. `compress verify --all` says why.")
    if line is not None and line.digest != found.digest:
        raise CompressError(
            f"{reference}: is not the version of line {line.seq} of the history: its manifest has another digest "
            f"({found.digest}; recorded is {line.digest})"
        )


def cover(past: History, version: Version, found: Manifest, signers: Path | None, now: datetime) -> Cover:
    """Which gates of a version waivers cover. Raises CompressError for a version that failed without a report."""
    needed: dict[str, str] = {}
    if found.verdict != "passed":
        needed = {each.key: each.sentence for each in waivers.gates_not_passed(version.path) if each.decisive}
        needed = needed or {VERDICT: f"The verdict is {found.verdict}."}
    counting: list[Waiver] = []
    why_not: list[str] = []
    for waiver in waivers.of_history(past, version.label):
        if reason := waivers.covers(waiver, found.digest, signers, now):
            why_not.append(visible(f"The waiver of {', '.join(waiver.gates)} by {waiver.who} {reason}."))
        else:
            counting.append(waiver)
    return Cover(needed, tuple(counting), tuple(why_not))


def counting_waivers(root: Path, past: History, version: Version, found: Manifest, now: datetime) -> list[Waiver]:
    """The waivers that let this version be released. Raises RefusedError, with every gate that none covers.

    A version that passed needs none. What does not count, and why, is part of the message.
    """
    if found.verdict == "passed":
        return []
    covered = cover(past, version, found, waivers.signers_of(root), now)
    if open_gates := covered.open_gates:
        sentences = [covered.needed[key] for key in open_gates]
        raise RefusedError(_refusal(version, found, sentences, open_gates, list(covered.why_not)))
    return list(covered.counting)


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
