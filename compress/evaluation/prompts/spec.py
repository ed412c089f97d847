"""What a recipe says about prompts, and the prompts themselves."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from compress.evaluation.tasks.items import unpaired_surrogate

MOST = 20
"""Prompts at most: people read them."""
MOST_CHARACTERS = 4000
"""Of one prompt."""


@dataclass(frozen=True)
class Prompt:
    """One question to a model."""

    id: str
    text: str


OWN = (
    Prompt("fact", "Name the capital of Australia and one river that flows through Germany."),
    Prompt("arithmetic", "A train leaves at 9:40 and arrives at 11:05. How many minutes does the journey take?"),
    Prompt("reasoning", "Anna is older than Ben. Clara is younger than Ben. Who is the youngest? Say why."),
    Prompt("code", "Write a Python function that returns the second largest number of a list."),
    Prompt(
        "summary",
        "Summarise in one sentence: The bakery on the corner opens at six. By seven the bread is gone, so "
        "people who come later buy cake instead.",
    ),
    Prompt("translation", "Translate into French: Where is the nearest railway station?"),
    Prompt("list", "List three things to check before a long walk in the mountains."),
    Prompt("rewrite", "Rewrite politely: Send me the report now."),
    Prompt("json", 'Answer with JSON only, with the keys "city" and "country": I live in Lisbon.'),
    Prompt("story", "Write the first two sentences of a story about a lighthouse keeper."),
    Prompt("explanation", "Explain to a child why the sky is dark at night."),
    Prompt("instruction", "Answer with exactly one word: what colour do you get from blue and yellow paint?"),
)
"""Asked where a recipe names no file."""


class Prompts(BaseModel):
    """Prompts that both models answer greedily, shown side by side in the report with differences marked. For people: nothing is measured, and no gate can name it. Asked through the public loader, so the whole model must fit in memory."""  # noqa: E501

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Literal["prompts"] = "prompts"
    file: Path | None = Field(
        default=None, description=f"JSONL with lines {{id, prompt}}, at most {MOST}; default: {len(OWN)} of our own"
    )
    max_new_tokens: int = Field(default=64, gt=0, le=1024, description="longest answer, in tokens")
    chat_template: Literal["auto"] | bool = Field(
        default="auto", description="put prompts through the tokenizer's chat template; auto: if it has one"
    )

    @property
    def measures(self) -> list[str]:
        """Nothing that a gate could judge."""
        return []

    def absolute(self, base: Path) -> Prompts:
        """The same with its file resolved against `base`."""
        if self.file is None:
            return self
        return self.model_copy(update={"file": (base / self.file.expanduser()).resolve()})


def read_prompts(spec: Prompts) -> tuple[tuple[Prompt, ...], list[str]]:
    """The prompts of a recipe, and every mistake of its file with its line."""
    if spec.file is None:
        return OWN, []
    try:
        lines = spec.file.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        return (), [f"{spec.file}: no such file"]
    except (OSError, UnicodeDecodeError) as error:
        return (), [f"{spec.file}: cannot be read ({error})"]
    found: dict[str, Prompt] = {}
    mistakes = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        prompt, wrong = _prompt(line, number)
        if prompt is not None and prompt.id in found:
            wrong = f"id {prompt.id!r} was used already"
        if wrong:
            mistakes.append(f"{spec.file}:{number}: {wrong}")
        elif prompt is not None:
            found[prompt.id] = prompt
    if len(found) > MOST:
        mistakes.append(f"{spec.file}: {len(found)} prompts; people read at most {MOST}. Use a task for more")
    if not found and not mistakes:
        mistakes.append(f"{spec.file}: the file is empty; write a line {{id, prompt}} for each prompt")
    return tuple(found.values()), mistakes


def _prompt(line: str, number: int) -> tuple[Prompt | None, str]:
    """One line as a prompt, or what is wrong with it."""
    try:
        data = json.loads(line)
    except ValueError as error:
        return None, f"not JSON ({error})"
    if unpaired_surrogate(line):
        return None, "holds half of a character (an unpaired surrogate), which no tokenizer reads"
    if not isinstance(data, dict) or set(data) - {"id", "prompt"}:
        return None, "write an object with `prompt`, and `id` if you like, and nothing else"
    identity, text = data.get("id", str(number)), data.get("prompt")
    if not isinstance(identity, (str, int)) or isinstance(identity, bool) or identity == "":
        return None, "`id` is not a text or a whole number"
    if not isinstance(text, str) or not text.strip():
        return None, "no `prompt`: it is the text that is asked"
    if len(text) > MOST_CHARACTERS:
        return None, f"{len(text)} characters; a prompt for people has at most {MOST_CHARACTERS}"
    return Prompt(str(identity), text), ""
