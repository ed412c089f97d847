"""Words that people type and the history keeps: only what can be read back, and only what a terminal may be shown."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable

_HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Categories of characters that move the cursor, change colours or turn the direction of writing."""


def not_utf8(*given: tuple[str, str | None]) -> list[str]:
    """A sentence for each (option, text) that is no UTF-8: a line with such a byte could not be read back."""
    return [
        f"{option} {visible(text)}: not UTF-8; type it in a terminal that uses UTF-8"
        for option, text in given
        if text and not is_utf8(text)
    ]


def is_utf8(text: str) -> bool:
    """False where the shell handed over a byte that is none, which Python keeps as half of a surrogate pair."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def mended(text: str) -> str:
    """`text` with each byte that is no UTF-8 replaced by U+FFFD."""
    return text if is_utf8(text) else os.fsencode(text).decode("utf-8", "replace")


def visible(text: str) -> str:
    """`text` for a terminal: control characters, line ends and directions of writing as escapes."""
    return text if text.isprintable() else "".join(_escaped(character) for character in text)


def visible_row(cells: Iterable[str]) -> list[str]:
    return [visible(cell) for cell in cells]


def _escaped(character: str) -> str:
    hidden = unicodedata.category(character) in _HIDDEN
    return character.encode("unicode_escape").decode("ascii") if hidden else character
