"""The one place that calls lm-eval: quietly, and without letting it touch the process's random state.

lm-eval prints, logs and draws progress bars; a run's stdout belongs to its result and its stderr to our own progress.
`simple_evaluate` would also seed the process's generators and start a dozen programs to describe the machine, so its
inner `evaluate` is called, with the few-shot seed set by us.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import cache
from importlib import metadata
from io import StringIO
from typing import Any

from compress.errors import EnvironmentLacksError

PACKAGE = "lm_eval"
REQUIREMENT = "lm_eval>=0.4.13"
_MODULES = ("lm_eval", "lm_eval.api", "lm_eval.evaluator", "lm_eval.tasks")


def require() -> None:
    """Raises EnvironmentLacksError with the pip command where lm-eval is not installed."""
    if any(not _found(name) for name in _MODULES):
        raise EnvironmentLacksError(
            "the recipe evaluates tasks, which need lm-eval, and it is not installed. Install it with: "
            f"pip install '{REQUIREMENT}' (or pip install 'compress-models[tasks]')"
        )


def _found(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def version() -> str:
    """Version of lm-eval, which decides prompts and marking."""
    return metadata.version(PACKAGE)


@contextmanager
def quiet() -> Iterator[None]:
    """Nothing that lm-eval, datasets or their libraries say reaches stdout, stderr or the log."""
    logger = logging.getLogger(PACKAGE)
    level, before = logger.level, logger.propagate
    logger.setLevel(logging.CRITICAL)
    logger.propagate = False
    # Libraries that it pulls in ask this when they start a thread pool of tokenizers.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
        logger.propagate = before


def ask(task: Any, lm: Any, positions: list[int] | None, chat_template: bool, seed: int) -> list[dict[str, Any]]:
    """Let lm-eval put a task to a model, and give its record of every item, in the order asked.

    positions: which of the task's documents are asked; None for all. Of a task with several ways of reading an answer
    (filters), the first one counts.
    """
    with quiet():
        from lm_eval.evaluator import evaluate

        name = task.config.task
        task.set_fewshot_seed(seed=seed)
        found = evaluate(
            lm=lm,
            task_dict={"tasks": {name: task}, "groups": {}},
            samples=None if positions is None else {name: positions},
            bootstrap_iters=0,
            apply_chat_template=chat_template,
            fewshot_as_multiturn=True,
        )
    records: list[dict[str, Any]] = found["samples"][name]
    first = records[0]["filter"]
    return [record for record in records if record["filter"] == first]


@cache
def _manager() -> Any:
    """lm-eval's index of its tasks, read from thousands of files: several seconds."""
    with quiet():
        from lm_eval.tasks import TaskManager

        return TaskManager()


def load_named(name: str) -> Any:
    """One of lm-eval's own tasks, by a name of `known_names`. Raises whatever its data set's loader raises."""
    manager = _manager()
    with quiet():
        return manager.load([name])


def known_names() -> list[str]:
    """Names of lm-eval's own tasks and groups."""
    return list(_manager().task_index)
