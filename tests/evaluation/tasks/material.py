"""Task files, and a tiny Llama whose tokenizer is glass's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from compress.checkpoints.reader import Checkpoint
from compress.evaluation.tasks.generate import Generation, write_texts
from compress.evaluation.tasks.likelihood import Scored, score_requests
from compress.events import Quiet
from tests.tiny import CPU, random_model

CHOICES: list[dict[str, Any]] = [
    {"id": "a", "context": "Alice was beginning to get very", "choices": ["tired", "a cold in the", "x"], "answer": 0},
    {"id": "b", "context": "The Queen of", "choices": ["Hearts", "Tarts, and then some more"], "answer": "Hearts"},
    {"id": "c", "context": "Off with", "choices": ["her head", "his", "their shoes", "it"], "answer": 0},
    {"id": "d", "context": "The White ", "choices": ["Rabbit", "rabbit"], "answer": 0},
    {"id": "e", "context": "", "choices": ["Curiouser", "The Mock Turtle sighed deeply"], "answer": 1},
    {"id": "f", "context": "Down, down, down. Would the fall never come to an", "choices": ["end", "x y"], "answer": 0},
]
CLOZE = [{"id": item["id"], "context": item["context"], "answer": item["choices"][0]} for item in CHOICES]


def write_jsonl(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def tiny_llama(folder: Path, glass: Path, name: str = "llama", **changes: Any) -> Path:
    """A random model over glass's vocabulary, with its tokenizer."""
    size = json.loads((glass / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    changes = {"max_position_embeddings": 128, "pad_token_id": None, **changes}
    random_model(name, folder, vocab_size=size, **changes)
    for file in glass.glob("*token*"):
        shutil.copy(file, folder)
    return folder


class Folder:
    """Answers from a folder, as a run gives them."""

    def __init__(self, folder: Path, tokenizer: Any, tokens_at_once: int = 64) -> None:
        self.folder, self.tokenizer, self.tokens_at_once = folder, tokenizer, tokens_at_once

    def score(self, requests: list[tuple[list[int], list[int]]]) -> list[Scored]:
        checkpoint = Checkpoint(self.folder)
        return score_requests(checkpoint, requests, CPU, torch.float32, self.tokens_at_once, Quiet(), "")

    def write(self, requests: list[Generation]) -> list[str]:
        return write_texts(self.folder, self.tokenizer, requests, CPU, torch.float32, self.tokens_at_once, Quiet(), "")
