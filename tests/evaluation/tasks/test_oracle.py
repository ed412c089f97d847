"""Our answers against those of lm-eval's own Hugging Face model on the same folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval")

from compress.checkpoints.export import export
from compress.evaluation.tasks import harness
from compress.evaluation.tasks.language_model import AnsweringLM
from compress.evaluation.tasks.prepare import prepare
from compress.evaluation.tasks.results import from_records
from compress.evaluation.tasks.spec import Task
from compress.stages.round_to_nearest import RoundToNearest
from tests.evaluation.tasks.material import CHOICES, CLOZE, Folder, tiny_llama, write_jsonl
from tests.tiny import apply_stage, load_publicly


def theirs(folder: Path, tokenizer: Any) -> Any:
    """HFLM in float32 with batches of 3, so that sequences of unequal length are padded."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=load_publicly(folder), tokenizer=tokenizer, batch_size=3)


def both(spec: Task, folder: Path, seed: int = 0, template: str | None = None) -> tuple[Any, Any]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    prepared = prepare(spec, tokenizer, 128, seed)
    found = []
    for lm in (AnsweringLM(tokenizer, Folder(folder, tokenizer)), theirs(folder, tokenizer)):
        records = harness.ask(prepared.question, lm, prepared.positions, spec.chat_template, seed)
        found.append(from_records(prepared.question, prepared.ids, records))
    return found[0], found[1]


@pytest.fixture(scope="module")
def models(glass: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {"glass": glass} | {
        name: tiny_llama(folder / name, glass, name) for name in ("llama", "gemma2", "gemma3_text", "mistral")
    }


@pytest.mark.parametrize("name", ["glass", "llama", "gemma2", "gemma3_text", "mistral"])
@pytest.mark.parametrize("few_shot", [0, 2])
@pytest.mark.parametrize("kind", ["multiple_choice", "cloze"])
def test_log_likelihoods_and_marks_equal_those_of_lm_evals_own_model(models, tmp_path, name, few_shot, kind):
    file = write_jsonl(tmp_path / "t.jsonl", CHOICES if kind == "multiple_choice" else CLOZE)
    ours, their = both(Task(name="t", file=file, type=kind, few_shot=few_shot), models[name])
    assert len(ours.answers) == 6 - few_shot
    assert ours.asked == their.asked
    for mine, other in zip(ours.answers, their.answers, strict=True):
        assert mine.loglikelihoods == pytest.approx(other.loglikelihoods, abs=1e-4)
        assert (mine.correct, mine.correct_norm, mine.greedy) == (other.correct, other.correct_norm, other.greedy)


def test_generated_text_equals_that_of_lm_evals_own_model(models, tmp_path):
    lines = [{**item, "answer": "x"} for item in CLOZE if item["context"]]
    file = write_jsonl(tmp_path / "t.jsonl", lines)
    spec = Task(name="t", file=file, type="generation", max_new_tokens=12, stop=("\n", "."))
    ours, their = both(spec, models["glass"])
    assert [answer.text for answer in ours.answers] == [answer.text for answer in their.answers]
    assert any(answer.text for answer in ours.answers)


@pytest.mark.parametrize("template", ["<bos>{{ messages[-1].content }}|", "{{ messages[-1].content }}|"])
def test_a_chat_template_is_read_alike_with_and_without_a_start_token_of_its_own(models, tmp_path, template):
    file = write_jsonl(tmp_path / "t.jsonl", CHOICES)
    spec = Task(name="t", file=file, few_shot=1, chat_template=True)
    ours, their = both(spec, models["glass"], template=template)
    assert ours.asked == their.asked and ours.asked[0].context.endswith("|")
    for mine, other in zip(ours.answers, their.answers, strict=True):
        assert mine.loglikelihoods == pytest.approx(other.loglikelihoods, abs=1e-4)


@pytest.mark.parametrize("kind", ["multiple_choice", "generation"])
def test_a_packed_export_answers_as_its_public_loader_does(models, tmp_path, kind):
    stage = RoundToNearest(bits=3, group_size="channel")
    checkpoint, _ = apply_stage(stage, models["glass"], tmp_path / "stage")
    folder = tmp_path / "export"
    export(checkpoint, folder, "compressed-tensors", torch.float16, 10**9)
    lines = CHOICES if kind == "multiple_choice" else [{**item, "answer": "x"} for item in CLOZE if item["context"]]
    spec = Task(name="t", file=write_jsonl(tmp_path / "t.jsonl", lines), type=kind)
    ours, their = both(spec, folder)
    for mine, other in zip(ours.answers, their.answers, strict=True):
        assert mine.text == other.text and mine.correct == other.correct
        assert (mine.loglikelihoods or ()) == pytest.approx(other.loglikelihoods or (), abs=1e-4)
