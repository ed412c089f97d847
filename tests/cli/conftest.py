"""Damaged copies of glass, small disks, and one published and one rejected run that tests look at."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

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
def published(glass_recipe: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A store with one passing run, made by the command, and what the command printed with --json."""
    folder = tmp_path_factory.mktemp("published")
    path = write_recipe(folder / "recipe.yaml", glass_recipe)
    ended = run_cli("run", path, "--store", folder / "store", "--json")
    assert ended.code == 0, ended.err
    return folder / "store", ended.out


@pytest.fixture(scope="session")
def rejected(glass_recipe: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A store with one run whose gate failed, and its report."""
    folder = tmp_path_factory.mktemp("rejected")
    gates = [{"kind": "threshold", "measure": "divergence.held-out.mean_kl", "max": 1e-9}]
    path = write_recipe(folder / "recipe.yaml", changed(glass_recipe, gates=gates))
    ended = run_cli("run", path, "--store", folder / "store", "--json")
    assert ended.code == 3, ended.err
    return folder / "store", json.loads(ended.out)
