"""Small artifacts for the tests: two tensors, a model card, a recipe and a report."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from compress.artifacts.store import Store

FACTS = {
    "lineage": {"source": "a" * 64, "recipe": "b" * 64, "calibration": "c" * 64},
    "environment": {"torch": "2.13.0", "device": "cpu", "threads": 2},
}


def fill(folder: Path, seed: int = 0) -> None:
    """Write what a run stages: model/ with one safetensors file, recipe.yaml and reports/."""
    (folder / "model").mkdir(parents=True)
    (folder / "reports").mkdir()
    weights = np.random.default_rng(seed).standard_normal((8, 4)).astype(np.float32)
    save_file({"layer.weight": weights, "layer.bias": np.zeros(4, np.float16)}, folder / "model" / "model.safetensors")
    (folder / "model" / "config.json").write_text("{}")
    (folder / "model" / "README.md").write_text(f"# written at {seed}")
    (folder / "recipe.yaml").write_text("schema: 1\n")
    (folder / "reports" / "report.json").write_text("{}")


def shard(folder: Path) -> None:
    """Split the model of `fill` into two shards with an index."""
    model = folder / "model"
    (model / "model.safetensors").unlink()
    save_file({"a": np.ones(2, np.float32)}, model / "model-00001-of-00002.safetensors")
    save_file({"b": np.ones(2, np.float32)}, model / "model-00002-of-00002.safetensors")
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


KL_GATE = {
    "kind": "threshold",
    "measure": "divergence.held-out.mean_kl",
    "observed": 0.2,
    "interval": None,
    "limit": "<= 0.1",
    "verdict": "failed",
    "sentence": "divergence.held-out.mean_kl is 0.2; the bound is <= 0.1: failed.",
    "tier": "critical",
}
SIZE_GATE = {**KL_GATE, "kind": "size", "measure": "weight_bytes", "sentence": "weight_bytes is 9; the bound is <= 8."}


def with_gates(*gates: dict[str, object]) -> Callable[[Path], None]:
    """A `prepare` for `publish`: the report tells of these gates."""

    def write(folder: Path) -> None:
        (folder / "reports" / "report.json").write_text(json.dumps({"gates": list(gates)}))

    return write


def overwrite(path: Path, content: bytes) -> None:
    """Damage a published file. It is read-only and may share its bytes with others: this changes all of them."""
    path.chmod(0o644)
    path.write_bytes(content)
    path.chmod(0o444)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def publish(store: Store) -> Callable[..., Path]:
    """publish(name="demo", verdict="passed", prepare=None) -> path; `prepare(folder)` may change what is staged."""

    def run(name: str = "demo", verdict: str = "passed", prepare: Callable[[Path], None] | None = None) -> Path:
        with store.staging(name) as staged:
            fill(staged)
            if prepare:
                prepare(staged)
            return store.publish(staged, name, verdict, FACTS)  # type: ignore[arg-type]

    return run
