"""Channels: which version is in staging, which in production. A file that a deploy job reads.

    <store>/<name>/channels/production.json
        {"schema": 1, "name": "demo", "channel": "production", "version": "v0003", "path": "demo/v0003",
         "digest": "<of its manifest>", "since": "2026-11-27T10:00:00Z", "by": "anna", "history": {...}}

`path` is relative to the store. The file follows from one line of the history, byte for byte, so that whatever else
stands in it is noticed. The line is written first and the file replaced after it: a crash between the two leaves the
channel as it was, and the next to take the lock writes that the line was not carried out.

A channel is a stack: `promoted` pushes, `rolled_back` pops down to the version it names, or pushes it if it was never
there. So two rollbacks go back two versions, and not forth again.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from compress.artifacts.history import History
from compress.artifacts.layout import make_folder, refuse_link, relative_path
from compress.artifacts.lines import MOVED, Line
from compress.artifacts.manifest import Manifest, Pin, Sha256
from compress.errors import CompressError, RecipeError, nearest
from compress.files import flush, write_text

CHANNELS = ("staging", "production")
FOLDER = "channels"


class Channel(BaseModel):
    """What a channel holds: the content of its file."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    schema_: Literal[1] = Field(default=1, alias="schema")
    name: str
    channel: str
    version: str = Field(description="v0003, or r0001 where a waiver allowed a rejected run")
    path: str = Field(description="of the version, relative to the store")
    digest: Sha256 = Field(description="of the version's manifest")
    since: AwareDatetime
    by: str
    note: str | None = None
    history: Pin = Field(description="the line of the name's history that this file follows from")

    def text(self) -> str:
        return json.dumps(self.model_dump(mode="json", by_alias=True, exclude_none=True), indent=2) + "\n"


@dataclass(frozen=True)
class State:
    """What the file of a channel says, beside what the history says. `wrong` is empty if they agree."""

    held: Line | None
    wrong: str = ""
    interrupted: bool = False
    """The last line was written, and a crash came before the file was replaced: `held` is what the file says."""


def check_channel(channel: str) -> None:
    if channel not in CHANNELS:
        raise RecipeError(
            f'there is no channel "{channel}", only {" and ".join(CHANNELS)}.{nearest(channel, CHANNELS)}'
        )


def path_of(home: Path, channel: str) -> Path:
    check_channel(channel)
    refuse_link(home / FOLDER)
    path = home / FOLDER / f"{channel}.json"
    refuse_link(path)
    return path


def stack(history: History, channel: str) -> tuple[Line, ...]:
    """What `channel` holds (last) and what a rollback would go back to, in order."""
    undone = history.undone
    held: list[Line] = []
    for line in history.lines:
        if line.event not in MOVED or line.channel != channel or line.seq in undone:
            continue
        if line.event == "rolled_back" and any(below.version == line.version for below in held):
            while held.pop().version != line.version:
                pass
        held.append(line)
    return tuple(held)


def of_line(name: str, line: Line) -> Channel:
    """The channel as the history tells of it."""
    assert line.channel is not None and line.version is not None and line.digest is not None
    return Channel(
        name=name,
        channel=line.channel,
        version=line.version,
        path=relative_path(name, line.version),
        digest=line.digest,
        since=line.at,
        by=line.who,
        note=line.note,
        history=Pin(seq=line.seq, sha256=line.digest_of_line),
    )


def read(home: Path, channel: str) -> Channel | None:
    """The file of a channel; None if nothing was ever promoted there.

    Raises RecipeError for a link or an unknown channel, CompressError when the file is damaged or leads elsewhere.
    """
    path = path_of(home, channel)
    try:
        found = Channel.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        remedy = f"`compress rollback {home.name} --channel {channel} --to VERSION` writes it again"
        raise CompressError(f"{path}: not a channel file ({_why(error)}); {remedy}") from error
    expected = (home.name, channel, relative_path(home.name, found.version))
    if (found.name, found.channel, found.path) != expected:
        raise CompressError(f"{path}: says {found.name}, {found.channel}, {found.path}: it has been edited or moved")
    return found


def _why(error: OSError | ValidationError) -> str:
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    first = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(str(part) for part in first["loc"])
    return f"{place}: {first['msg']}" if place else str(first["msg"])


def write(home: Path, line: Line) -> Channel:
    """Replace the file of a channel by what `line` says, in one step. Under the name's lock."""
    channel = of_line(home.name, line)
    path = path_of(home, channel.channel)
    make_folder(path.parent)
    write_text(path, channel.text())
    flush(path.parent, recurse=False)
    return channel


def state(home: Path, history: History, channel: str) -> State:
    """Compare the file with the history. Never raises for what it finds."""
    held = _top(history, channel)
    where = f"{FOLDER}/{channel}.json"
    path = home / FOLDER / f"{channel}.json"
    if path.is_symlink() or path.parent.is_symlink():
        return State(held, f"{where}: a link; a channel is a plain file")
    try:
        content: bytes | None = path.read_bytes()
    except FileNotFoundError:
        content = None
    except OSError as error:
        return State(held, f"{where}: cannot be read ({error.strerror})")
    if content == _content(home, held):
        return State(held)
    last = history.lines[-1] if history.lines else None
    if last and held and last.seq == held.seq:
        before = _top(replace(history, lines=history.lines[:-1]), channel)
        if content == _content(home, before):
            return State(before, f"{where}: line {last.seq} was not carried out: a crash came first", interrupted=True)
    if content is None:
        return State(held, f"{where}: missing, though it should hold {held.version if held else ''}")
    if held is None:
        return State(held, f"{where}: is there, though nothing was ever promoted")
    return State(held, f"{where}: is not what line {held.seq} of the history says: it has been edited or replaced")


def is_link(home: Path, channel: str) -> bool:
    return (home / FOLDER).is_symlink() or (home / FOLDER / f"{channel}.json").is_symlink()


def remembered(home: Path, channel: str) -> Pin | None:
    """The line that the file of a channel says it follows from; None where it does not say so."""
    try:
        return Channel.model_validate_json((home / FOLDER / f"{channel}.json").read_bytes()).history
    except (OSError, ValidationError):
        return None


def refuse_wrong(home: Path, history: History, channel: str, label: str) -> None:
    """Raises CompressError when a channel's file is not what the history says, or does not hold `label` any more."""
    found = state(home, history, channel)
    if found.wrong:
        raise CompressError(f"{home.name}/{found.wrong}")
    if found.held is None or found.held.version != label:
        raise CompressError(f"{home.name}: {channel} was changed by somebody else just now; look again, then repeat")


def other_bytes(state: State, channel: str, found: Manifest) -> str:
    """What is wrong if the version that a channel leads to has another digest than the one promoted; else empty."""
    if state.held is None or found.digest == state.held.digest:
        return ""
    return (
        f"{FOLDER}/{channel}.json: line {state.held.seq} of the history put {state.held.version} there with the digest "
        f"{state.held.digest}; what is there has {found.digest}"
    )


def strangers(home: Path) -> list[str]:
    """What lies among the channels and is none. Files being written begin with a dot."""
    known = {f"{channel}.json" for channel in CHANNELS}
    try:
        names = sorted(path.name for path in (home / FOLDER).iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [f"{FOLDER}/{name}: not the file of a channel" for name in names if name not in known and name[0] != "."]


def _top(history: History, channel: str) -> Line | None:
    lines = stack(history, channel)
    return lines[-1] if lines else None


def _content(home: Path, line: Line | None) -> bytes | None:
    return None if line is None else of_line(home.name, line).text().encode()
