"""The command line: one small file per group of verbs. Each verb parses, makes one call, prints, and ends with a code.

Nothing heavy is imported until a verb needs it, so that `compress --help` answers at once.
"""

from __future__ import annotations

from compress.cli.app import app, main

__all__ = ["app", "main"]
