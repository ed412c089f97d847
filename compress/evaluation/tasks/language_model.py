"""lm-eval's interface to a model, twice: one that only writes down what it is asked, one that answers from a folder.

Tokens are those that lm-eval's own Hugging Face model would make: context and continuation are tokenised together and
cut where the context alone ends, trailing spaces of the context going to the continuation.
"""

from __future__ import annotations

import sys
from contextlib import redirect_stderr
from typing import Any, Protocol

from lm_eval.api.model import TemplateLM

from compress.evaluation.tasks.generate import Generation
from compress.evaluation.tasks.likelihood import Scored


class Answers(Protocol):
    """How a model answers. Token ids in, in the order asked."""

    def score(self, requests: list[tuple[list[int], list[int]]]) -> list[Scored]: ...

    def write(self, requests: list[Generation]) -> list[str]: ...


class PromptLM(TemplateLM):  # type: ignore[misc]
    """Tokenises as lm-eval's HFLM does. Subclasses answer `score` and `write`."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands for an empty context: the start token, or the end token of models without one."""
        bos = self.tokenizer.bos_token_id
        return int(bos) if bos is not None else self.eot_token_id

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; with None, special tokens as the tokenizer itself adds them, but no second start token."""
        if add_special_tokens is None and string.startswith(self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        more = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer.encode(string, **more))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def encode_request(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """(context ids, continuation ids); the continuation is empty where it tokenises to nothing."""
        if context:
            before, after = self._encode_pair(context, continuation)
            return list(before), list(after)
        ids = self.tok_encode(continuation, add_special_tokens=False)
        if ids and ids[0] == self.prefix_token_id:
            return ids[:1], ids[1:]
        return [self.prefix_token_id], ids

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        scored = self.score([self.encode_request(*request.args) for request in requests])
        return [(one.loglikelihood, one.greedy) for one in scored]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        return self.write([self._generation(*request.args) for request in requests])

    def _generation(self, context: str, settings: dict[str, Any]) -> Generation:
        stop = settings.get("until") or []
        stop = [stop] if isinstance(stop, str) else list(stop)
        longest = settings.get("max_gen_toks", settings.get("max_new_tokens", 256))
        prompt = self.tok_encode(context) or [self.prefix_token_id]
        return Generation(tuple(prompt), tuple(stop), int(longest))

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        raise NotImplementedError("perplexity is an evaluation of its own, not a task")

    def _loglikelihood_tokens(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
        raise NotImplementedError("`loglikelihood` is overridden")

    def score(self, requests: list[tuple[list[int], list[int]]]) -> list[Scored]:
        raise NotImplementedError

    def write(self, requests: list[Generation]) -> list[str]:
        raise NotImplementedError


class Recorder(PromptLM):
    """Writes down what is asked, and answers nothing: the dry run."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer)
        self.scored: list[tuple[list[int], list[int]]] = []
        self.written: list[Generation] = []

    def score(self, requests: list[tuple[list[int], list[int]]]) -> list[Scored]:
        self.scored += requests
        return [Scored(0.0, False) for _ in requests]

    def write(self, requests: list[Generation]) -> list[str]:
        self.written += requests
        return ["" for _ in requests]


class AnsweringLM(PromptLM):
    """Answers from a model. lm-eval is kept quiet; what the model shows of its progress is not."""

    def __init__(self, tokenizer: Any, answers: Answers) -> None:
        super().__init__(tokenizer)
        self._answers, self._stderr = answers, sys.stderr

    def score(self, requests: list[tuple[list[int], list[int]]]) -> list[Scored]:
        with redirect_stderr(self._stderr):
            return self._answers.score(requests)

    def write(self, requests: list[Generation]) -> list[str]:
        with redirect_stderr(self._stderr):
            return self._answers.write(requests)
