"""Starts a run, kills it with kill -9 at a random point, again and again, then lets one finish. A program of its own.

    python -m tests.end_to_end.killer KILLS SEED RECIPE STORE

Everything heavy is imported once; each attempt is a fork, so that a dozen kills take seconds. Prints a JSON list of
[what the store and cache held when the attempt ended, exit status] for the test to look at.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path


def attempt(arguments: list[str], kill_after: float | None) -> tuple[int, float]:
    """Exit status as from waitpid (9: killed), and seconds."""
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        from compress.cli.app import guarded

        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os._exit(guarded(arguments))
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return status, time.monotonic() - started


def main() -> None:
    import compressed_tensors
    import datasets
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.models.llama import modeling_llama

    from compress import pipeline
    from compress import recipe as recipes

    del torch, datasets, compressed_tensors, AutoModelForCausalLM, AutoTokenizer, modeling_llama, pipeline, recipes
    kills, seed, recipe, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
    cache = Path(os.environ["COMPRESS_CACHE"])
    arguments = ["run", recipe, "--store", str(store)]

    # How long a whole run takes here and now; its cache and store are its own.
    os.environ["COMPRESS_CACHE"] = f"{cache}-rehearsal"
    status, whole = attempt([*arguments[:-1], f"{store}-rehearsal"], None)
    assert status == 0, f"the uninterrupted run ended with {status}"
    os.environ["COMPRESS_CACHE"] = str(cache)

    draw = random.Random(seed)
    history = []
    for _ in range(kills):
        status, _ = attempt(arguments, draw.uniform(0.0, 1.0) * whole)
        blocks = len(list(cache.glob("stages/*/block-*.json")))
        history.append([blocks, len(list(cache.glob("stages/*/stage.json"))), status])
    status, _ = attempt(arguments, None)
    history.append([4, 1, status])
    print(json.dumps(history))


if __name__ == "__main__":
    main()
