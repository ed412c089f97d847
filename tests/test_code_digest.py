"""Which code decides results: everything that stages import, or a change of it would reuse what older code made."""

from __future__ import annotations

import ast
from pathlib import Path

import compress
from compress.steps.environment import _CODE

ROOT = Path(compress.__file__).parent
WITHOUT_NUMBERS = {"errors.py", "events.py", "files.py", "memory", "__init__.py"}
"""Imported by stages, but deciding no number: words, files, and how much memory is free."""


def imported_by(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    names |= {
        f"compress.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "compress"
        for alias in node.names
    }
    return {name.split(".")[1] for name in names if name.startswith("compress.")}


def test_everything_that_stages_are_made_of_is_in_the_fingerprint():
    seen, waiting = set(), {"stages"}
    while waiting:
        part = waiting.pop()
        seen.add(part)
        paths = [ROOT / f"{part}.py"] if (ROOT / f"{part}.py").is_file() else (ROOT / part).rglob("*.py")
        waiting |= {name for path in paths for name in imported_by(path)} - seen
    parts = {f"{name}.py" if (ROOT / f"{name}.py").is_file() else name for name in seen}

    assert parts - WITHOUT_NUMBERS <= set(_CODE), f"missing: {sorted(parts - WITHOUT_NUMBERS - set(_CODE))}"
