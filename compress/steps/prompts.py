"""Prompts of a run: both models answer greedily through the public loader, for people to compare."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compress.checkpoints.sources import cache_folder
from compress.errors import RecipeError
from compress.evaluation.prompts.spec import Prompt, Prompts, read_prompts
from compress.evaluation.tasks.generate import Generation, write_texts
from compress.events import Event, Progress
from compress.files import digest_of_json, write_text
from compress.steps.candidate import Candidate
from compress.steps.environment import code_digest, fits, versions
from compress.steps.plan import Plan
from compress.steps.source import OpenedSource, load_tokenizer


@dataclass(frozen=True)
class Conversation:
    """What both models were asked and answered. `candidate` is empty before the second has been asked."""

    spec: Prompts
    prompts: tuple[Prompt, ...]
    requests: tuple[Generation, ...]
    template: str | None
    """Digest of the chat template; None if none was used."""
    source: tuple[str, ...] = ()
    candidate: tuple[str, ...] = ()
    events: tuple[Event, ...] = field(default=())

    @property
    def digest(self) -> str:
        """sha256 over the tokens of every prompt and how an answer ends."""
        return digest_of_json([(one.prompt, one.stop, one.max_new_tokens) for one in self.requests])


def ask_source_prompts(plan: Plan, source: OpenedSource, progress: Progress) -> Conversation | None:
    """The source's answers, from an earlier run where it asked the same; None if the recipe has no prompts. Raises
    RecipeError for prompts that cannot be asked."""
    spec = plan.recipe.prompts
    if spec is None:
        return None
    prompts, _ = read_prompts(spec)
    requests, template = _requests(spec, prompts, source.tokenizer, str(source.source.folder))
    _check_lengths(prompts, requests, plan.dimensions.max_context)
    conversation = Conversation(spec, prompts, requests, template)
    if not fits(plan.parameters, plan.reload_bytes, plan.machine):
        message = "answers are written by the whole model, which does not fit in memory at once; no prompt was asked"
        return Conversation(spec, prompts, requests, template, events=(Event("task_skipped", "prompts", message),))
    path = _kept(plan, source, conversation)
    answers = _load(path, len(prompts))
    events: tuple[Event, ...] = ()
    if answers is None:
        answers = _write(plan, source.source.folder, source.tokenizer, requests, progress, "the source's answers")
        write_text(path, json.dumps(answers))
    else:
        events = (Event("baseline_reused", "prompts", "the source's answers came from the cache"),)
    return Conversation(spec, prompts, requests, template, tuple(answers), (), events)


def ask_candidate_prompts(
    plan: Plan, candidate: Candidate, asked: Conversation | None, progress: Progress
) -> Conversation | None:
    """With the judged model's answers. Raises RecipeError where its tokenizer would ask anything else."""
    if asked is None or not asked.source:
        return asked
    tokenizer = candidate.tokenizer or load_tokenizer(candidate.folder)
    requests, template = _requests(asked.spec, asked.prompts, tokenizer, str(candidate.folder))
    if (requests, template) != (asked.requests, asked.template):
        raise RecipeError(
            f"prompts: the tokenizer or chat template of {candidate.folder} gives other prompts than the source's, so "
            "the answers cannot be compared"
        )
    answers = _write(plan, candidate.loadable, tokenizer, requests, progress, f"the {candidate.noun}'s answers")
    return Conversation(asked.spec, asked.prompts, requests, template, asked.source, tuple(answers), asked.events)


def _requests(
    spec: Prompts, prompts: tuple[Prompt, ...], tokenizer: Any, folder: str
) -> tuple[tuple[Generation, ...], str | None]:
    """Every prompt as tokens, and the digest of the chat template they went through."""
    has = bool(getattr(tokenizer, "chat_template", None))
    if spec.chat_template is True and not has:
        raise RecipeError(f"prompts: chat_template is asked for, but the tokenizer of {folder} has none.")
    use = has if spec.chat_template == "auto" else spec.chat_template
    requests = []
    for prompt in prompts:
        if use:
            messages = [{"role": "user", "content": prompt.text}]
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            ids = tokenizer(prompt.text)["input_ids"]
        if not ids:
            raise RecipeError(f"prompts: {prompt.id} tokenises to nothing, so it cannot be asked")
        requests.append(Generation(tuple(ids), (), spec.max_new_tokens))
    return tuple(requests), digest_of_json(str(tokenizer.chat_template)) if use else None


def _check_lengths(prompts: tuple[Prompt, ...], requests: tuple[Generation, ...], most: int | None) -> None:
    lengths = [len(one.prompt) + one.max_new_tokens for one in requests]
    long = [
        f"prompts: {prompt.id}: {length} tokens with its answer, the model's context is {most}"
        for prompt, length in zip(prompts, lengths, strict=True)
        if most and length > most
    ]
    if long:
        raise RecipeError(long)


def _write(
    plan: Plan, folder: Path, tokenizer: Any, requests: tuple[Generation, ...], progress: Progress, label: str
) -> list[str]:
    machine = plan.machine
    return write_texts(
        folder, tokenizer, requests, machine.device, machine.compute, machine.tokens_at_once, progress, label
    )


def _kept(plan: Plan, source: OpenedSource, asked: Conversation) -> Path:
    key = digest_of_json(
        {
            "source": source.digest,
            "asked": asked.digest,
            "machine": plan.machine.to_json(),
            "code": code_digest(),
            "versions": versions(),
        }
    )
    return cache_folder() / "baselines" / f"{key}.prompts.json"


def _load(path: Path, count: int) -> list[str] | None:
    """Kept answers, or None if they are not there or not whole."""
    try:
        answers = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    whole = isinstance(answers, list) and len(answers) == count and all(isinstance(text, str) for text in answers)
    return answers if whole else None
