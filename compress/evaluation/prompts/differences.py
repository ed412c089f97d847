"""Where two texts differ, word by word, for marking them side by side."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from itertools import groupby

_PIECES = re.compile(r"\s+|\w+|[^\w\s]")


@dataclass(frozen=True)
class Piece:
    """A run of text that is the same on both sides, or is on this side only."""

    text: str
    differs: bool


def differences(first: str, second: str) -> tuple[list[Piece], list[Piece]]:
    """Both texts as pieces: joined, each side is the text it came from."""
    words = [_PIECES.findall(text) for text in (first, second)]
    matcher = difflib.SequenceMatcher(None, words[0], words[1], autojunk=False)
    differs = [[True] * len(side) for side in words]
    for start, other, length in matcher.get_matching_blocks():
        if "".join(words[0][start : start + length]).strip():  # a space alone between two changed words is no agreement
            differs[0][start : start + length] = [False] * length
            differs[1][other : other + length] = [False] * length
    return _runs(words[0], differs[0]), _runs(words[1], differs[1])


def _runs(words: list[str], differs: list[bool]) -> list[Piece]:
    """Neighbours alike in one piece."""
    together = groupby(zip(words, differs, strict=True), key=lambda pair: pair[1])
    return [Piece("".join(word for word, _ in run), mark) for mark, run in together]
