"""Damaged copies of glass, small disks, and one published and one rejected run that tests look at."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import once
from tests.helpers import changed, run_cli, write_recipe


@pytest.fixture
def copy_of_glass(glass: Path, tmp_path: Path) -> Path:
    """A folder a test may damage."""
    return Path(shutil.copytree(glass, tmp_path / "model"))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """disk("size=12m") mounts a small file system for the length of the test."""
    mounted: list[Path] = []

    def mount(options: str) -> Path:
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True, check=False
        )
        if done.returncode:
            pytest.skip(f"mounting a tmpfs is not permitted here: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "--lazy", folder], check=False)


@pytest.fixture(scope="session")
def published(glass_recipe: dict[str, Any], shared: Path) -> tuple[Path, str]:
    """A store with one passing run, made by the command, and what the command printed with --json."""
    folder = _made_once(shared / "published", glass_recipe, expected_code=0)
    return folder / "store", (folder / "printed.json").read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def rejected(glass_recipe: dict[str, Any], shared: Path) -> tuple[Path, dict[str, Any]]:
    """A store with one run whose gate failed, and its report."""
    gates = [{"kind": "threshold", "measure": "divergence.held-out.mean_kl", "max": 1e-9}]
    folder = _made_once(shared / "rejected", changed(glass_recipe, gates=gates), expected_code=3)
    return folder / "store", json.loads((folder / "printed.json").read_text(encoding="utf-8"))


def _made_once(folder: Path, recipe: dict[str, Any], expected_code: int) -> Path:
    def build(unused: Path) -> None:
        # Not in the folder that is renamed: the report names the path of its artifact.
        place = folder.with_name(folder.name + "-run")
        place.mkdir()
        ended = run_cli("run", write_recipe(place / "recipe.yaml", recipe), "--store", place / "store", "--json")
        assert ended.code == expected_code, ended.err
        (place / "printed.json").write_text(ended.out, encoding="utf-8")

    once(folder, build)
    return folder.with_name(folder.name + "-run")
