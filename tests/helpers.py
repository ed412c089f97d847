"""What tests in several folders need: the command line in a process of its own, and recipes as dictionaries."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

PROJECT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Ended:
    """How a command ended, as a user sees it."""

    code: int
    out: str
    err: str


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "compress", *map(str, arguments)]


def environment(changes: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a child: this one, with the project importable from anywhere."""
    return {**os.environ, "PYTHONPATH": str(PROJECT), "COLUMNS": "200", **(changes or {})}


def run_cli(
    *arguments: object, env: Mapping[str, str] | None = None, cwd: Path | None = None, timeout: float = 300
) -> Ended:
    """`python -m compress ...` in a process of its own."""
    done = subprocess.run(
        command(*arguments), env=environment(env), cwd=cwd, timeout=timeout, capture_output=True, text=True
    )
    return Ended(done.returncode, done.stdout, done.stderr)


def start_cli(*arguments: object, env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """The same, still running. Ctrl-C reaches it even where the shell that started the tests ignores it."""
    return subprocess.Popen(
        command(*arguments),
        env=environment(env),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def write_recipe(path: Path, recipe: Mapping[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(dict(recipe), sort_keys=False), encoding="utf-8")
    return path


def changed(recipe: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """A copy of `recipe` with top-level keys replaced; None removes a key."""
    merged = {**copy.deepcopy(dict(recipe)), **changes}
    return {key: value for key, value in merged.items() if value is not None}


def digest_of_newest(store: Path, name: str = "glass-int4") -> str:
    """Model digest of the newest published version."""
    newest = sorted((store / name).glob("v*"))[-1]
    manifest = json.loads((newest / "manifest.json").read_text(encoding="utf-8"))
    return str(manifest["model_digest"])
