"""Items -> an lm-eval task, built in memory; or one of lm-eval's own, checked to be one that can be compared."""

from __future__ import annotations

from typing import Any

from compress.errors import EnvironmentLacksError, RecipeError, nearest
from compress.evaluation.tasks import harness
from compress.evaluation.tasks.items import Drawn, Item
from compress.evaluation.tasks.spec import Task

OUTPUT_TYPES = {"multiple_choice": "multiple_choice", "cloze": "loglikelihood", "generation": "generate_until"}
_SCORES = ("acc", "exact_match")
"""Scores of lm-eval that are 1 for a right item and 0 for a wrong one, the first that a task has counts."""


def local_task(spec: Task, drawn: Drawn) -> Any:
    """The lm-eval task of a local file: documents are the items, examples come in file order."""
    with harness.quiet():
        from datasets import Dataset
        from lm_eval.api.task import ConfigurableTask

        splits = {"test": Dataset.from_list([_document(spec, item) for item in drawn.asked])}
        if drawn.examples:
            splits["examples"] = Dataset.from_list([_document(spec, item) for item in drawn.examples])
        return ConfigurableTask(config=_config(spec, splits))


def _document(spec: Task, item: Item) -> dict[str, Any]:
    """An item as lm-eval reads it. A cloze's answer carries its delimiter: lm-eval adds one for choices only."""
    document = item.to_json()
    if spec.type == "cloze" and not spec.chat_template:
        document["written"] = f"{spec.delimiter}{item.answer}"
    elif spec.type == "cloze":
        document["written"] = item.answer
    return document


def _config(spec: Task, splits: dict[str, Any]) -> dict[str, Any]:
    """Plain column names, no templates: braces in an item stay text."""
    config: dict[str, Any] = {
        "task": spec.label,
        "custom_dataset": lambda **_: splits,
        "test_split": "test",
        "output_type": OUTPUT_TYPES[spec.type],
        "doc_to_text": "context",
        "doc_to_target": "written" if spec.type == "cloze" else "answer",
        "target_delimiter": "" if spec.type == "cloze" else spec.delimiter,
        "num_fewshot": spec.few_shot or 0,
        "metric_list": [_metric("acc"), *([_metric("acc_norm")] if spec.type == "multiple_choice" else [])],
    }
    if "examples" in splits:
        config |= {"fewshot_split": "examples", "fewshot_config": {"sampler": "first_n"}}
    if spec.type == "multiple_choice":
        config["doc_to_choice"] = "choices"
    if spec.type == "generation":
        config["generation_kwargs"] = {"until": list(spec.stop), "max_gen_toks": spec.max_new_tokens}
        config["process_results"] = _same_text
    return config


def _metric(name: str) -> dict[str, Any]:
    return {"metric": name, "aggregation": "mean", "higher_is_better": True}


def _same_text(document: dict[str, Any], results: list[str]) -> dict[str, Any]:
    """Exact match after joining runs of white space."""
    return {"acc": int(" ".join(results[0].split()) == " ".join(str(document["answer"]).split()))}


def named_task(spec: Task) -> Any:
    """One of lm-eval's own tasks by name. Raises RecipeError where it is unknown or cannot be compared by item."""
    assert spec.task is not None
    known = harness.known_names()
    if spec.task not in known:
        # lm-eval would also take a path here, to a file that may name code to run.
        near = nearest(spec.task, known)
        raise RecipeError(f"task {spec.task}: lm-eval has no such task.{near} `lm-eval ls tasks` lists them.")
    try:
        loaded = harness.load_named(spec.task)
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise EnvironmentLacksError(
            f"task {spec.task}: its data cannot be loaded ({first}). It comes from a hub; where there is none, name a "
            "local `file:` instead."
        ) from error
    tasks = loaded["tasks"]
    if len(tasks) != 1:
        few = ", ".join(sorted(tasks)[:6])
        raise RecipeError(f"task {spec.task}: a group of {len(tasks)} tasks; name them one by one, e.g. {few}")
    (task,) = tasks.values()
    if spec.few_shot is not None:
        task.set_config(key="num_fewshot", value=spec.few_shot)
    elif task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    _comparable(spec, task)
    return task


def _comparable(spec: Task, task: Any) -> None:
    """Raises RecipeError where a task's items are not right or wrong, or its text is sampled."""
    kind = task.get_config("output_type")
    if kind not in OUTPUT_TYPES.values():
        raise RecipeError(f"task {spec.task}: {kind} is no question with an answer; evaluate a perplexity instead")
    generation = task.get_config("generation_kwargs") or {}
    if generation.get("do_sample") and generation.get("temperature", 1.0) > 0:
        raise RecipeError(f"task {spec.task}: it samples its text; only greedy text can be compared")
    if score_of(task) is None:
        have = ", ".join(map(str, task.aggregation()))
        able = " or ".join(_SCORES)
        raise RecipeError(f"task {spec.task}: it is scored by {have}; tasks scored by {able} can be compared")
    if spec.normalise and "acc_norm" not in task.aggregation():
        raise RecipeError(f"task {spec.task}: lm-eval has no acc_norm for it; leave out `normalise`")


def score_of(task: Any) -> str | None:
    """The name of a task's right-or-wrong score."""
    return next((name for name in _SCORES if name in task.aggregation()), None)
