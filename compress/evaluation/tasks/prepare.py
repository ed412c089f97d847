"""The prompts of a task as tokens, from a dry run through lm-eval: checked, and digested, before any work.

The digest covers every token that a model will read and every right answer, so it stands for items, examples, chat
template and tokenizer together: the source's answers are kept by it, and an export whose tokenizer would ask anything
else is refused.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from compress.errors import RecipeError
from compress.evaluation.looks import look_sizes
from compress.evaluation.tasks import harness
from compress.evaluation.tasks.items import MOST_MISTAKES, Drawn, draw, in_file_order, order
from compress.evaluation.tasks.spec import Task
from compress.files import digest_of_json, sha256_of


@dataclass(frozen=True)
class Prepared:
    """A task ready to be asked. `question` is lm-eval's task."""

    spec: Task
    question: Any
    positions: list[int] | None
    """Documents of `question` that are asked, in this order; None for all."""
    ids: tuple[str, ...]
    """Of the items, in the order asked."""
    contexts: tuple[str, ...]
    """What an item itself says, without examples and chat template; empty where lm-eval builds it of several texts."""
    available: int
    """Items that could be asked."""
    generates: bool
    digest: str
    facts: dict[str, Any]
    """For the report: where the items are from, how they are put."""
    ranks: tuple[int, ...] = ()
    """Of each item, when it was drawn."""

    @property
    def name(self) -> str:
        return self.spec.label


def prepare(spec: Task, tokenizer: Any, max_context: int | None, seed: int) -> Prepared:
    """Build a task, ask all of it that may be asked in a dry run, and check its prompts. Raises RecipeError with all
    mistakes of the task."""
    from compress.evaluation.tasks import question as questions
    from compress.evaluation.tasks.language_model import Recorder

    check_template(spec, tokenizer)
    if spec.file is not None:
        drawn, mistakes = draw(spec, seed)
        if mistakes:
            raise RecipeError(mistakes)
        asked: Any = questions.local_task(spec, drawn)
        positions, available, ranks = None, drawn.available, drawn.ranks
        documents = [item.to_json() for item in drawn.asked]
    else:
        drawn, asked = None, questions.named_task(spec)
        positions, available, ranks = _limited(spec, asked, seed)
        documents = [dict(asked.eval_docs[at]) for at in (positions or range(available))]
    recorder = Recorder(tokenizer)
    records = harness.ask(asked, recorder, positions, spec.chat_template, seed)
    ids = tuple(str(document["id"]) for document in documents) if drawn else tuple(str(r["doc_id"]) for r in records)
    places = [f"{spec.file}:{item.line}" for item in drawn.asked] if drawn else [f"task {spec.label}" for _ in ids]
    owners = [at for at, record in enumerate(records) for _ in record["arguments"]]
    wrong = _unanswerable(owners, recorder) | _too_long(owners, recorder, max_context)
    if wrong:
        raise RecipeError(_sentences(wrong, places, ids))
    contexts = tuple(str(d["context"]) for d in documents) if drawn else tuple(_context(asked, r) for r in records)
    digest = _digest(records, recorder)
    facts = _facts(spec, drawn, asked, tokenizer)
    generates = bool(recorder.written)
    return Prepared(spec, asked, positions, ids, contexts, available, generates, digest, facts, ranks)


def by_look(whole: Prepared, tokenizer: Any, seed: int) -> tuple[Prepared, tuple[Prepared, ...]]:
    """The items of the first look, and what each further one adds."""
    sizes = look_sizes(whole.spec.items or len(whole.ids), len(whole.ids))
    if len(sizes) == 1:
        return whole, ()
    parts = [_part(whole, start, stop, tokenizer, seed) for start, stop in pairwise((0, *sizes))]
    unbounded = whole.spec.model_copy(update={"floor": None})  # the source is held to its floor once, before any stage
    return parts[0], tuple(replace(part, spec=unbounded) for part in parts[1:])


def _part(whole: Prepared, start: int, stop: int, tokenizer: Any, seed: int) -> Prepared:
    """The items that were drawn as number start..stop-1, in file order."""
    kept = [at for at, rank in enumerate(whole.ranks) if start <= rank < stop]
    part = replace(
        whole,
        positions=[whole.positions[at] for at in kept] if whole.positions is not None else kept,
        ids=tuple(whole.ids[at] for at in kept),
        contexts=tuple(whole.contexts[at] for at in kept),
        ranks=tuple(whole.ranks[at] for at in kept),
    )
    return replace(part, digest=tokens_asked(part, tokenizer, seed))


def check_template(spec: Task, tokenizer: Any) -> None:
    """Raises RecipeError where a task wants a chat template and the tokenizer has none."""
    if spec.chat_template and not getattr(tokenizer, "chat_template", None):
        raise RecipeError(
            f"task {spec.label}: chat_template is asked for, but the tokenizer of {tokenizer.name_or_path} has none. "
            "Leave it out, or use a chat model."
        )


def _limited(spec: Task, question: Any, seed: int) -> tuple[list[int] | None, int, tuple[int, ...]]:
    """Positions that may be asked of one of lm-eval's tasks, how many there are, and when each was drawn."""
    available = len(question.eval_docs)
    for name, limit in (("items", spec.items or 1), ("max_items", spec.max_items or 1)):
        if limit > available:
            raise RecipeError(f"task {spec.label}: {name} is {limit}, lm-eval's {spec.task} has {available}")
    if spec.items is None:
        return None, available, tuple(range(available))
    positions, ranks = in_file_order(order(available, seed)[: spec.most])
    return positions, available, ranks


def _context(question: Any, record: dict[str, Any]) -> str:
    text = question.doc_to_text(record["doc"])
    return text if isinstance(text, str) else ""


def _unanswerable(owners: list[int], recorder: Any) -> dict[int, str]:
    """By item: choices and answers that are no token at all. owners[i] is the item of request i."""
    found: dict[int, str] = {}
    for request, (_, after) in enumerate(recorder.scored):
        if not after:
            choice = request - owners.index(owners[request])
            found[owners[request]] = f"choice {choice} tokenises to nothing after its context, so it cannot be asked"
    return found


def _too_long(owners: list[int], recorder: Any, max_context: int | None) -> dict[int, str]:
    """By item: prompts that do not fit in the model's context. They would be cut, and something else be asked."""
    lengths = [len(before) + len(after) - 1 for before, after in recorder.scored]
    lengths += [len(one.prompt) + one.max_new_tokens for one in recorder.written]
    longest: dict[int, int] = {}
    for owner, length in zip(owners, lengths, strict=True):
        longest[owner] = max(length, longest.get(owner, 0))
    return {
        owner: f"{length} tokens with its answer, the model's context is {max_context}"
        for owner, length in longest.items()
        if max_context and length > max_context
    }


def _sentences(wrong: dict[int, str], places: list[str], ids: tuple[str, ...]) -> list[str]:
    """The first mistakes in words, and how many more there are."""
    said = [f"{places[at]}: item {ids[at]}: {sentence}" for at, sentence in sorted(wrong.items())]
    if len(said) > MOST_MISTAKES:
        said[MOST_MISTAKES:] = [f"{places[0].rpartition(':')[0] or places[0]}: and {len(said) - MOST_MISTAKES} more"]
    return said


def _digest(records: list[dict[str, Any]], recorder: Any) -> str:
    """sha256 over every prompt's tokens, how it is ended, and every right answer."""
    written = [(one.prompt, one.stop, one.max_new_tokens) for one in recorder.written]
    return digest_of_json(
        {"scored": recorder.scored, "written": written, "answers": [record["target"] for record in records]}
    )


def tokens_asked(prepared: Prepared, tokenizer: Any, seed: int) -> str:
    """The digest again, for another tokenizer: equal where both models are asked the same tokens."""
    from compress.evaluation.tasks.language_model import Recorder

    recorder = Recorder(tokenizer)
    return _digest(
        harness.ask(prepared.question, recorder, prepared.positions, prepared.spec.chat_template, seed), recorder
    )


def _facts(spec: Task, drawn: Drawn | None, question: Any, tokenizer: Any) -> dict[str, Any]:
    """Where the items are from and how they are put, for the report."""
    template = str(tokenizer.chat_template) if spec.chat_template else None
    facts: dict[str, Any] = {
        "type": spec.type if drawn else str(question.get_config("output_type")),
        "few_shot": int(question.get_config("num_fewshot") or 0),
        "chat_template": digest_of_json(template) if template is not None else None,
        "lm_eval": harness.version(),
    }
    if drawn is None:
        return {**facts, "source": f"lm-eval: {spec.task}"}
    assert spec.file is not None
    examples: Path | None = spec.few_shot_file
    return {
        **facts,
        "source": str(spec.file),
        "file_sha256": sha256_of(spec.file),
        "examples": None if not drawn.examples else str(examples) if examples else "items that are not asked",
    }
