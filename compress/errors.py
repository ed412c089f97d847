"""Every error a user can meet, and the exit code each one ends the command with.

    CompressError                 1   internal error (anything unexpected ends here too)
    │   (ManifestError, in artifacts.manifest, also ends with 1)
    ├── RecipeError               2   bad recipe or usage; carries every mistake at once
    ├── RefusedError              3   a release that gates and waivers do not allow
    ├── UnhealthySourceError      5   the source model cannot be trusted as a baseline
    │   (DamagedCheckpointError, in checkpoints.folder, also ends with 5)
    ├── ResourceError             6   out of memory or disk
    └── EnvironmentLacksError     7   the environment lacks something the recipe needs

A gate that fails (3) or is inconclusive (4) is a verdict, not an error. Ctrl-C ends with 130.
Only the command line catches these; everything else raises and lets go.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from enum import IntEnum


class ExitCode(IntEnum):
    """What the shell sees. Documented in docs/reference/exit-codes.md and tested through the command line."""

    PASSED = 0
    INTERNAL_ERROR = 1
    BAD_RECIPE = 2
    GATE_FAILED = 3
    GATE_INCONCLUSIVE = 4
    UNHEALTHY_SOURCE = 5
    OUT_OF_RESOURCES = 6
    ENVIRONMENT_LACKS = 7
    INTERRUPTED = 130


class CompressError(Exception):
    """Base class. `str(error)` is the sentence a user reads: place, what was found, what would work."""

    exit_code: ExitCode = ExitCode.INTERNAL_ERROR


class RecipeError(CompressError):
    """One or more mistakes in a recipe or on the command line.

    `mistakes` holds one sentence each, in file order, with the line where it is known.
    """

    exit_code = ExitCode.BAD_RECIPE

    def __init__(self, mistakes: str | Iterable[str]) -> None:
        self.mistakes: list[str] = [mistakes] if isinstance(mistakes, str) else list(mistakes)
        super().__init__("\n".join(self.mistakes))


class RefusedError(CompressError):
    """A version may not be released: its gates did not pass and no waiver that holds covers them."""

    exit_code = ExitCode.GATE_FAILED


class UnhealthySourceError(CompressError):
    """The source model has non-finite weights, or a perplexity above the floor the recipe allows."""

    exit_code = ExitCode.UNHEALTHY_SOURCE


class ResourceError(CompressError):
    """Memory or disk ran out, or would."""

    exit_code = ExitCode.OUT_OF_RESOURCES


class EnvironmentLacksError(CompressError):
    """A package, device or model that the recipe asks for is not here."""

    exit_code = ExitCode.ENVIRONMENT_LACKS


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ' Did you mean "x"?' for the known name closest to `name`, or an empty string."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f' Did you mean "{matches[0]}"?' if matches else ""
