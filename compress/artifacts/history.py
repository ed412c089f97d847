"""What happened to a name, in order: one JSON line an event, each carrying the sha256 of the line before.

    <store>/<name>/history.jsonl    only ever appended to, under the name's lock
    <store>/<name>/history.head     {"seq": 12, "sha256": "..."} of the last line

A line is canonical JSON (sorted keys, no spaces, ASCII), so its bytes follow from its fields. The first line's
`previous` is 64 zeros. What is noticed:

    a changed or swapped line, one removed from the middle    `previous` of a later line does not fit
    lines removed from the end                                the head, a manifest or a channel knows a lost line
    a torn last line (power loss)                             it has no newline; cut off under the lock, and said so

Whoever can write the store can also write a new chain with a new head, manifests and channels. Only a copy of the head
kept elsewhere reveals that.
"""

from __future__ import annotations

import getpass
import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from pydantic import ValidationError

from compress.artifacts.layout import relative_path
from compress.artifacts.lines import MADE, MOVED, ZERO, Draft, Line, check_chain, parse
from compress.artifacts.manifest import MANIFEST_NAME, Pin
from compress.artifacts.words import mended, visible
from compress.errors import CompressError
from compress.files import disk_errors, flush, write_json

HISTORY_NAME = "history.jsonl"
HEAD_NAME = "history.head"


@dataclass(frozen=True)
class History:
    """All lines, and what is wrong with them. `ends` are the sha256 of the raw lines, in order."""

    path: Path
    lines: tuple[Line, ...] = ()
    ends: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    torn_at: int | None = None
    """Bytes of the whole lines, if something follows that is none."""
    lost: str = ""
    """How the head contradicts the lines, if it does."""
    settled: tuple[str, ...] = ()
    """Contradictions on record that hold no longer (`is_settled`)."""

    @property
    def pin(self) -> Pin:
        """What the next manifest or channel remembers: how long the history is, and its last line."""
        return Pin(seq=len(self.ends), sha256=self.ends[-1] if self.ends else ZERO)

    @property
    def undone(self) -> set[int]:
        return {line.undoes for line in self.lines if line.undoes is not None}

    def made(self) -> dict[str, Line]:
        """By label, the line that tells of a version that should be there: made, and not collected since."""
        found: dict[str, Line] = {}
        undone = self.undone
        for line in self.lines:
            if line.version is None or line.seq in undone:
                continue
            if line.event in MADE:
                found[line.version] = line
            elif line.event == "collected":
                found.pop(line.version, None)
        return found

    def highest(self, rejected: bool) -> int:
        """The highest number ever given out; 0 if none was. Numbers of collected versions do not come back."""
        labels = (line.version for line in self.lines if line.version is not None)
        return max((int(label[1:]) for label in labels if label.startswith("r") == rejected), default=0)

    def contradicts(self, pin: Pin) -> str:
        """How a remembered line contradicts these lines, in words; empty if it does not."""
        if pin.seq == 0:
            return "" if pin.sha256 == ZERO else "line 0 is none, but it has a digest"
        if pin.seq > len(self.ends):
            return f"line {pin.seq} is gone: the history ends after line {len(self.ends)}"
        return "" if self.ends[pin.seq - 1] == pin.sha256 else f"line {pin.seq} is not the one that was there"

    def has_broken(self, draft: Draft) -> bool:
        """Whether this contradiction is on record already."""
        wanted = (draft.version, draft.channel, draft.detail)
        return any(
            line.event == "broken" and (line.version, line.channel, line.detail) == wanted and not self.is_settled(line)
            for line in self.lines
        )

    def is_settled(self, line: Line) -> bool:
        """Whether a line `broken` holds no longer: its channel was set anew, or its version was taken away.

        What contradicted the lines themselves holds for ever.
        """
        if line.channel:
            undone = self.undone
            later = [each for each in self.lines if each.seq > line.seq and each.seq not in undone]
            return any(each.event in MOVED and each.channel == line.channel for each in later)
        home = self.path.parent
        return (
            bool(line.version)
            and not (home.parent / relative_path(home.name, line.version or "") / MANIFEST_NAME).is_file()
        )


def whoever() -> str:
    """Who runs this, where nobody is named: the login name, or the number of the user."""
    try:
        return mended(getpass.getuser())
    except (KeyError, OSError):  # a container's user may have no name
        return f"uid {os.getuid()}"


def read(home: Path) -> History:
    """The history of the name in `home`. Problems are collected, never raised; an absent one is empty."""
    path = home / HISTORY_NAME
    if path.is_symlink() or (home / HEAD_NAME).is_symlink():
        return History(path, problems=(f"{HISTORY_NAME}: it or its head is a link; a store holds plain files only",))
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        content = b""
    except OSError as error:
        return History(path, problems=(f"{HISTORY_NAME}: cannot be read ({error.strerror})",))
    whole = content.rfind(b"\n") + 1
    raw = content[:whole].split(b"\n")[:-1]
    lines, problems = parse(raw, HISTORY_NAME)
    ends = tuple(hashlib.sha256(text).hexdigest() for text in raw)
    problems += check_chain(lines, ends, HISTORY_NAME)
    history = History(path, tuple(line for line in lines if line), ends, (), whole if whole < len(content) else None)
    lost = _against_head(home / HEAD_NAME, history)
    problems += [f"{HISTORY_NAME}: {lost}"] if lost else []
    broken, settled = _broken(history)
    return replace(history, problems=(*problems, *broken), lost=lost, settled=tuple(settled))


def append(home: Path, history: History, drafts: Sequence[Draft], at: datetime | None = None) -> tuple[Line, ...]:
    """Write `drafts` to the end of `history`, as it was just read under the lock held now. Returns their lines.

    All of it is on the disk when this returns. Raises ResourceError, and leaves the file as it was, when the disk is
    full; CompressError, before anything is written, for a line that could not be read back.
    """
    if not drafts:
        return ()
    lines = chained(history.pin, drafts, at)
    for line in lines:
        _refuse_unreadable(line)
    data = b"".join(line.text() + b"\n" for line in lines)
    path = home / HISTORY_NAME
    with disk_errors(home):
        made = not path.exists()
        if made and not (home / HEAD_NAME).exists():
            _write_head(home, history.pin)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            before = os.fstat(handle).st_size
            try:
                _write_all(handle, data)
                os.fsync(handle)
            except BaseException:
                os.ftruncate(handle, before)
                raise
        finally:
            os.close(handle)
        _write_head(home, Pin(seq=lines[-1].seq, sha256=lines[-1].digest_of_line))
        if made:
            flush(home, recurse=False)
    return lines


def chained(pin: Pin, drafts: Iterable[Draft], at: datetime | None = None) -> tuple[Line, ...]:
    """`drafts` as the lines that follow the line `pin`."""
    moment = (at or datetime.now(UTC)).astimezone(UTC).replace(microsecond=0)
    lines: list[Line] = []
    seq, previous = pin.seq, pin.sha256
    for draft in drafts:
        seq += 1
        lines.append(Line(**draft.model_dump(), seq=seq, at=moment, previous=previous))
        previous = lines[-1].digest_of_line
    return tuple(lines)


def cut_torn(home: Path, history: History) -> None:
    """Remove the piece of a line that a power loss left at the end."""
    if history.torn_at is not None:
        with disk_errors(home), (home / HISTORY_NAME).open("r+b") as stream:
            stream.truncate(history.torn_at)
            os.fsync(stream.fileno())


def _refuse_unreadable(line: Line) -> None:
    try:
        same = Line.model_validate_json(line.text()).text() == line.text()
    except ValueError:  # pydantic's ValidationError is one
        same = False
    if not same:
        raise CompressError(
            f"a line `{line.event}` of {visible(line.who)} could not be read back, so it is not written"
        )


def refuse_damaged(name: str, history: History) -> None:
    """Raises CompressError when the lines are not those that were written."""
    if history.problems:
        raise CompressError(f"{name}: {history.problems[0]}. `compress verify --all` lists everything that is wrong.")


def _write_head(home: Path, pin: Pin) -> None:
    write_json(home / HEAD_NAME, pin.model_dump(mode="json"))


def _write_all(handle: int, data: bytes) -> None:
    while data:
        data = data[os.write(handle, data) :]


def _broken(history: History) -> tuple[list[str], list[str]]:
    """What lines `broken` tell: what still holds, and what is settled."""
    told: tuple[list[str], list[str]] = ([], [])
    for line in history.lines:
        if line.event == "broken":
            settled = history.is_settled(line)
            remedy = "" if settled else _remedy(line, history.path.parent.name)
            told[settled].append(f"{HISTORY_NAME}: line {line.seq} records that {line.detail}{remedy}")
    return told


def _remedy(line: Line, name: str) -> str:
    if line.channel:
        return f"; look who did it, then `compress rollback {name} --channel {line.channel} --to VERSION` sets it anew"
    return "; if it was copied here by hand, take it away" if line.version else ""


def _against_head(path: Path, history: History) -> str:
    """How the head contradicts the lines. It may lag behind them: a crash came before it was replaced."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        # The first head is written before the first line, so no crash leaves lines without one.
        count = len(history.ends)
        return f"{HEAD_NAME} is missing beside {count} lines" if count else ""
    except OSError as error:
        return f"{HEAD_NAME} cannot be read ({error.strerror})"
    try:
        pin = Pin.model_validate_json(content)
    except ValidationError:
        return f"{HEAD_NAME} is damaged"
    if not re.fullmatch(rb'\{\n "seq": \d+,\n "sha256": "[0-9a-f]{64}"\n\}\n', content):
        return f"{HEAD_NAME} is not written as it was: it has been edited"
    contradiction = history.contradicts(pin)
    return f"{contradiction}, says {HEAD_NAME}" if contradiction else ""
