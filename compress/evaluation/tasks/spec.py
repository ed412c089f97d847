"""What a recipe says about one task."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

TaskType = Literal["multiple_choice", "cloze", "generation"]


class Task(BaseModel):
    """Questions with answers, through lm-eval: one of its own tasks by name, or a JSONL file with lines {id, context, choices, answer}. Both models get the same prompts. Measures: task.<name>.accuracy; for multiple_choice with normalise also .accuracy_norm; for cloze also .nll (nats of a whole answer)."""  # noqa: E501

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Literal["task"] = "task"
    task: str | None = Field(
        default=None, min_length=1, description="one of lm-eval's tasks by name; its data come from a hub"
    )
    name: str = Field(
        default="", pattern=r"^[A-Za-z0-9_-]*$", description="name in measurements; default: that of `task`"
    )
    file: Path | None = Field(default=None, description="JSONL of a local task")
    type: TaskType = Field(
        default="multiple_choice",
        description="of a local task: the likeliest of the choices, the answer's own likelihood, or greedy text",
    )
    items: int | None = Field(default=None, gt=0, description="how many are asked, drawn by the seed; default: all")
    max_items: int | None = Field(
        default=None,
        gt=0,
        description="up to how many may be asked where a non_inferiority gate cannot decide",
    )
    few_shot: int | None = Field(
        default=None,
        ge=0,
        description="answered examples before each question; default: 0, or what the named task says",
    )
    few_shot_file: Path | None = Field(
        default=None, description="JSONL the examples come from; default: items that are then not asked"
    )
    chat_template: bool = Field(default=False, description="put the prompt through the tokenizer's chat template")
    floor: float | None = Field(
        default=None, ge=0, le=1, description="accuracy the source must reach, or nothing is compressed (exit 5)"
    )
    normalise: bool = Field(
        default=False, description="also measure .accuracy_norm: log-likelihoods divided by the choice's characters"
    )
    delimiter: str = Field(default=" ", description="between context and answer of a local task")
    stop: tuple[str, ...] = Field(default=(), description="strings that end generated text")
    max_new_tokens: int = Field(default=64, gt=0, description="longest generated text, in tokens")

    @model_validator(mode="after")
    def _consistent(self) -> Task:
        """All rules that span fields, their sentences joined."""
        # A resolved recipe writes every default, so a field counts as said only where it differs from its default.
        said = {name for name, field in type(self).model_fields.items() if getattr(self, name) != field.default}
        wrong = []
        if (self.task is None) == (self.file is None):
            wrong.append("give either `task:` (one of lm-eval's) or `file:` (a local JSONL)")
        if self.file is not None and not self.name:
            wrong.append("a local task needs a `name:`, e.g. name: capitals")
        if self.task is not None:
            local = sorted(said & {"type", "few_shot_file", "delimiter", "stop", "max_new_tokens"})
            wrong += [f"`{field}` is for local tasks; {self.task} brings its own" for field in local]
        elif self.type != "generation":
            wrong += [f"`{field}` is for type: generation" for field in sorted(said & {"stop", "max_new_tokens"})]
        if self.normalise and self.type != "multiple_choice":
            wrong.append("`normalise` is for multiple_choice: only choices have lengths to divide by")
        if self.few_shot_file is not None and not self.few_shot:
            wrong.append("`few_shot_file` without `few_shot`: say how many examples are shown")
        if self.max_items is not None and (self.items is None or self.max_items < self.items):
            wrong.append("`max_items` needs `items`, and must not be less")
        if any(not text for text in self.stop):
            wrong.append("an empty `stop` string would end every text at once")
        if wrong:
            raise ValueError("; ".join(wrong))
        return self

    @property
    def label(self) -> str:
        """The name in measurements and file names."""
        return self.name or re.sub(r"[^A-Za-z0-9_-]", "_", self.task or "")

    @property
    def most(self) -> int | None:
        """Up to how many items may be asked; None for all."""
        return self.max_items or self.items

    def absolute(self, base: Path) -> Task:
        """The same with its files' paths resolved against `base`."""
        files = {"file": self.file, "few_shot_file": self.few_shot_file}
        resolved = {name: (base / path.expanduser()).resolve() for name, path in files.items() if path is not None}
        return self.model_copy(update=resolved)

    @property
    def measures(self) -> list[str]:
        """Flat names of what is measured."""
        more = ["accuracy_norm"] if self.normalise else ["nll"] if self.file and self.type == "cloze" else []
        return [f"task.{self.label}.{what}" for what in ("accuracy", *more)]
