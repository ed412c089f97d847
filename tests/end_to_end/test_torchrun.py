"""`torchrun -m compress run` as a user calls it: one artifact, the one a single process makes, and endings of both."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.helpers import Ended, digest_of_newest, environment


def _torchrun(*arguments: object, cache: object) -> Ended:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    env = environment({"COMPRESS_CACHE": str(cache), "OMP_NUM_THREADS": "1"})
    done = subprocess.run(
        [*launcher, "-m", "compress", *map(str, arguments)], env=env, capture_output=True, text=True, timeout=120
    )
    return Ended(done.returncode, done.stdout, done.stderr)


def test_two_processes_publish_what_one_publishes(recipe, here, tmp_path, monkeypatch):
    path = recipe()
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache-alone"))
    assert here("run", path, "--store", tmp_path / "alone").code == 0

    ended = _torchrun("run", path, "--store", tmp_path / "together", "--json", cache=tmp_path / "cache-together")

    assert ended.code == 0, ended.err
    report = json.loads(ended.out)
    assert report["provenance"]["processes"] == 2
    assert ended.err.count("plan: stored") == 1, "followers print nothing"
    assert [path.name for path in (tmp_path / "together" / "glass-int4").glob("v*")] == ["v0001"]
    assert digest_of_newest(tmp_path / "together") == digest_of_newest(tmp_path / "alone")


def test_a_mistake_in_the_recipe_is_said_once_and_ends_both(recipe, tmp_path):
    path = recipe(stages=[{"kind": "gptq", "group_size": 48}])

    ended = _torchrun("run", path, "--store", tmp_path / "store", cache=tmp_path / "cache")

    assert ended.code != 0
    assert ended.err.count("mistakes:") == 1
    assert "into groups of 48" in ended.err
    assert "exitcode  : 2" in ended.err
