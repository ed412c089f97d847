"""Kill -9 at random points, run again: the bytes of an uninterrupted run, and nothing half-made in the store."""

from __future__ import annotations

import json
import random
import subprocess
import sys

from compress.artifacts.store import Store
from compress.artifacts.verify import verify
from tests.helpers import PROJECT, digest_of_newest, environment

KILLS = 14


def test_a_run_killed_at_random_points_ends_with_the_bytes_of_an_uninterrupted_one(recipe, tmp_path):
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    store = tmp_path / "store"
    done = subprocess.run(
        [sys.executable, "-m", "tests.end_to_end.killer", str(KILLS), str(seed), recipe(), store],
        env=environment({"COMPRESS_CACHE": str(tmp_path / "cache")}),
        cwd=PROJECT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    history = json.loads(done.stdout)

    assert sum(status == 9 for _, _, status in history) >= KILLS // 3, f"too few kills landed: {history}"
    assert history[-1][2] == 0
    versions = Store(store).versions("glass-int4")
    assert versions and not any(version.rejected for version in versions)
    for version in versions:
        assert verify(version.path).problems == ()
        manifest = json.loads((version.path / "manifest.json").read_text())
        assert manifest["model_digest"] == digest_of_newest(tmp_path / "store-rehearsal")
    assert list((store / ".staging").iterdir()) == []
    assert not list((tmp_path / "cache").rglob("*.building"))
