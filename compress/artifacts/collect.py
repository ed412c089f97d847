"""Which versions may go, and how they go. A version is kept when any of these holds:

    a channel holds it, or would go back to it
    anybody ever waived anything of it
    it is among the newest `keep` published ones of its name, or published ones are not to go
    it is rejected and younger than asked, or rejected ones are not to go
    a version that is kept was made from it, however far back

What goes is first written to the history, then renamed into `.staging` (from then on nothing sees it), then deleted.
The locks of all names are held meanwhile, so that nothing new can point to what is going.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from compress.artifacts import channels, history, layout, manifest, waivers
from compress.artifacts.history import History
from compress.artifacts.layout import NAME_RULE, Version
from compress.artifacts.lines import Draft
from compress.artifacts.manifest import Manifest, ManifestError
from compress.artifacts.store import Store
from compress.errors import RecipeError, nearest
from compress.files import disk_errors, flush

_AGE = re.compile(r"([0-9]+)([dhw])")
_HOURS = {"h": 1, "d": 24, "w": 168}


@dataclass(frozen=True)
class Rules:
    """What may go. None: nothing of that kind."""

    keep: int | None = None
    """How many of the newest published versions of each name stay."""
    rejected_older_than: timedelta | None = None


@dataclass(frozen=True)
class Collected:
    """A version that went, or with a dry run would."""

    version: Version
    digest: str
    bytes: int
    why: str


@dataclass(frozen=True)
class Kept:
    """A version that the rules would let go, and what holds it."""

    version: Version
    why: str


@dataclass(frozen=True)
class Collection:
    """What went, what was held, and the bytes that are free now: those that no version left shares."""

    gone: tuple[Collected, ...]
    kept: tuple[Kept, ...]
    freed: int


@dataclass(frozen=True)
class _Seen:
    version: Version
    manifest: Manifest


def read_age(text: str) -> timedelta:
    """'30d', '12h', '2w' as a length of time. Raises RecipeError for anything else."""
    matched = _AGE.fullmatch(text)
    if not matched:
        raise RecipeError(f"{text!r} is no age; write it as 30d, 12h or 2w")
    return timedelta(hours=int(matched[1]) * _HOURS[matched[2]])


def collect(
    store: Store,
    rules: Rules,
    name: str | None = None,
    dry_run: bool = False,
    by: str | None = None,
    now: datetime | None = None,
) -> Collection:
    """Remove what the rules let go from the store, or from one name.

    Damaged versions stay, and all of a name whose history is damaged: what held them can no longer be told. Raises
    RecipeError for rules that let nothing go or an unknown name, CompressError for a damaged channel.
    """
    _check(store, rules, name)
    with _everything(store) as pasts:
        seen = [each for other in pasts for each in _read(store, other)]
        going = _candidates(seen, rules, now or datetime.now(UTC), name)
        held = _held(store, pasts, seen, going)
        kept = [Kept(each.version, held[each.version.reference]) for each in seen if each.version.reference in held]
        leaving = [each for each in seen if each.version.reference in going and each.version.reference not in held]
        gone = [
            Collected(each.version, each.manifest.digest, each.manifest.bytes, going[each.version.reference])
            for each in leaving
        ]
        freed = _freed(leaving)
        for each in gone if not dry_run else []:
            _remove(store, each, by)
    return Collection(tuple(gone), tuple(kept), freed)


def _check(store: Store, rules: Rules, name: str | None) -> None:
    if rules.keep is None and rules.rejected_older_than is None:
        raise RecipeError(
            "say what may go: --keep N (newest published versions that stay) or --rejected-older-than 30d"
        )
    if rules.keep is not None and rules.keep < 1:
        raise RecipeError(f"--keep {rules.keep}: at least 1, so that a name never loses its newest version")
    if name is not None and not store.versions(name):
        raise RecipeError(f'There is no "{name}" in the store {store.root}.{nearest(name, store.names())}')


@contextmanager
def _everything(store: Store) -> Iterator[dict[str, History]]:
    """The locks of all names, always taken in the same order; publishers hold one and wait for none."""
    with ExitStack() as locks:
        names = sorted(name for name in layout.entries(store.root) if NAME_RULE.fullmatch(name))
        yield {name: locks.enter_context(store.locked(name)) for name in names}


def _read(store: Store, name: str) -> Iterator[_Seen]:
    for version in store.versions(name):
        try:
            yield _Seen(version, manifest.read(version.path))
        except ManifestError:
            continue


def _candidates(seen: list[_Seen], rules: Rules, now: datetime, name: str | None) -> dict[str, str]:
    """By reference, why the rules let a version go."""
    found: dict[str, str] = {}
    published: dict[str, list[_Seen]] = {}
    for each in seen:
        if name is not None and each.version.name != name:
            continue
        if not each.version.rejected:
            published.setdefault(each.version.name, []).append(each)
        elif rules.rejected_older_than is not None and now - each.manifest.created > rules.rejected_older_than:
            found[each.version.reference] = f"rejected on {each.manifest.created:%Y-%m-%d}"
    for listed in published.values() if rules.keep is not None else []:
        for each in listed[: -rules.keep if rules.keep else None]:
            found[each.version.reference] = f"older than the {rules.keep} newest"
    return found


def _held(store: Store, pasts: dict[str, History], seen: list[_Seen], going: dict[str, str]) -> dict[str, str]:
    """By reference, what holds a version that would go."""
    held: dict[str, str] = {}
    for name, past in pasts.items():
        if past.problems:
            held |= {each.version.reference: "its history is damaged" for each in seen if each.version.name == name}
        for channel in channels.CHANNELS:
            lines = channels.stack(past, channel)
            current = channels.read(store.home(name), channel)
            if current:
                held.setdefault(f"{name}@{current.version}", f"{channel} holds it")
            if lines:
                held.setdefault(f"{name}@{lines[-1].version}", f"{channel} holds it")
            if len(lines) > 1:
                held.setdefault(f"{name}@{lines[-2].version}", f"{channel} would go back to it")
        for waiver in waivers.of_history(past):
            held.setdefault(f"{name}@{waiver.label}", f"{waiver.who} waived gates of it")
    stays = [each for each in seen if each.version.reference not in going or each.version.reference in held]
    by_reference = {each.version.reference: each for each in seen}
    while stays:
        child = stays.pop()
        parent = by_reference.get(child.manifest.parent.reference) if child.manifest.parent else None
        if parent and parent.version.reference in going and parent.version.reference not in held:
            held[parent.version.reference] = f"{child.version.reference} was made from it"
            stays.append(parent)
    return {reference: why for reference, why in held.items() if reference in going}


def _freed(leaving: list[_Seen]) -> int:
    """Bytes of the files all of whose links leave."""
    links: dict[tuple[int, int], int] = {}
    sizes: dict[tuple[int, int], tuple[int, int]] = {}
    for each in leaving:
        for parent, _, names in os.walk(each.version.path):
            for name in names:
                found = os.lstat(os.path.join(parent, name))
                key = (found.st_dev, found.st_ino)
                links[key] = links.get(key, 0) + 1
                sizes[key] = (found.st_nlink, found.st_size)
    return sum(size for key, (total, size) in sizes.items() if links[key] == total)


def _remove(store: Store, each: Collected, by: str | None) -> None:
    version = each.version
    home = store.home(version.name)
    draft = Draft(
        event="collected", who=by or history.whoever(), version=version.label, digest=each.digest, detail=each.why
    )
    with disk_errors(home):
        history.append(home, history.read(home), [draft])
        with store.claimed(f"{version.name}-{version.label}") as folder:
            os.rename(version.path, folder / version.label)
            flush(version.path.parent, recurse=False)
