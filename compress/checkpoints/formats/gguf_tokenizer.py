"""A tokenizer's files as the keys that llama.cpp reads, or the reason why it could not read such a tokenizer.

Two kinds are known: byte-level BPE (GPT-2's, `gpt2`), whose splitting into words llama.cpp has built in under a name
that is found here by the regular expressions in tokenizer.json; and SentencePiece-like BPE with bytes to fall back on
(`llama`). Source: llama.cpp's llama-vocab.cpp and convert_hf_to_gguf.py.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Key = tuple[str, Any, str]
"""Key, value, and which of the writer's `add_` functions takes it."""
SPACE = "\u2581"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

_SPLITS = (
    ("\\p{N}{1,3}", "llama-bpe"),
    ("?\\p{L}+|\\p{N}| ?", "qwen2"),
)
"""A part of a Split's regular expression, and llama.cpp's name of the whole."""


@dataclass(frozen=True)
class Vocabulary:
    """What a file says of its tokenizer. `left_out` is the reason where it says that there is none."""

    keys: tuple[Key, ...]
    folder: Path
    merges: bool = False
    left_out: str = ""

    def add_to(self, writer: Any) -> None:
        """Merges, ids of special tokens, what is put before a prompt, and the chat template: the package finds them."""
        for key, value, kind in self.keys:
            getattr(writer, f"add_{kind}")(key, value)
        if not self.left_out:
            import gguf

            gguf.SpecialVocab(self.folder, load_merges=self.merges).add_to_gguf(writer, quiet=True)


def vocabulary_of(folder: Path, size: int) -> Vocabulary:
    """The tokenizer of a model folder. Ids beyond tokenizer.json's, up to `size`, are filled in as unused."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return _none(folder, "the model brings no tokenizer.json")
    content = json.loads(path.read_text(encoding="utf-8"))
    model = content.get("model") or {}
    if model.get("type") != "BPE":
        return _none(folder, f"tokenizers of type {model.get('type')} are not written here, BPE ones are")
    if model.get("byte_fallback"):
        kind, pre, prefix = "llama", "default", _space_prefix(content)
        if prefix is None:
            return _none(folder, "llama.cpp does not prepare text as its tokenizer does before it looks for pieces")
        if any(SPACE in token["content"] and token.get("normalized") for token in content.get("added_tokens") or []):
            return _none(folder, f"llama.cpp looks for its added tokens before it writes spaces as {SPACE}")
    else:
        kind, pre, prefix = "gpt2", _pre_tokenizer(content.get("pre_tokenizer")), None
        if not pre:
            return _none(folder, "llama.cpp has no name for how its tokenizer splits text into words")
    if content.get("normalizer") and kind == "gpt2" and content["normalizer"].get("type") != "NFC":
        return _none(
            folder, f"llama.cpp does not normalise text as its tokenizer does ({content['normalizer'].get('type')})"
        )
    tokens, types = _tokens(content, size, kind)
    keys: list[Key] = [
        ("tokenizer.ggml.model", kind, "string"),
        ("tokenizer.ggml.pre", pre, "string"),
        ("tokenizer.ggml.tokens", tokens, "array"),
        ("tokenizer.ggml.token_type", types, "array"),
    ]
    if kind == "llama":
        keys.append(("tokenizer.ggml.add_space_prefix", bool(prefix), "bool"))
        keys.append(("tokenizer.ggml.scores", _scores(content, tokens), "array"))
    return Vocabulary(tuple(keys), folder, merges=kind == "gpt2")


def _none(folder: Path, reason: str) -> Vocabulary:
    keys = (("tokenizer.ggml.model", "no_vocab", "string"),)
    return Vocabulary(keys, folder, left_out=f"{reason}; the file takes token ids only")


def _pre_tokenizer(pre: Any) -> str:
    """llama.cpp's name of a byte-level tokenizer's splitting, or '' where it has none that is known here."""
    steps = (pre or {}).get("pretokenizers", [pre] if pre else [])
    kinds = [step.get("type") for step in steps]
    if not kinds or kinds[-1] != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return ""
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and steps[1].get("use_regex", True):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True):
        pattern = str((steps[0].get("pattern") or {}).get("Regex", ""))
        return next((name for part, name in _SPLITS if part in pattern), "")
    return ""


def _space_prefix(content: dict[str, Any]) -> bool | None:
    """Whether a SentencePiece-like tokenizer puts a space before a text, as its normaliser or its splitting says; None
    where it does something else to text than to write spaces as \u2581."""
    normalizer, pre = content.get("normalizer") or {}, content.get("pre_tokenizer") or {}
    steps = normalizer.get("normalizers", [normalizer] if normalizer else [])
    prefix = replaced = False
    for step in steps:
        if step.get("type") == "Prepend" and step.get("prepend") == SPACE:
            prefix = True
        elif step.get("type") == "Replace" and step.get("pattern") == {"String": " "} and step.get("content") == SPACE:
            replaced = True
        else:
            return None
    if replaced and pre.get("type") == "Split" and pre.get("pattern") == {"String": " "}:
        pre = {}  # Gemma's: no space is left to split at.
    if pre.get("type") == "Metaspace" and pre.get("replacement", SPACE) == SPACE:
        return prefix or pre.get("prepend_scheme", "always") != "never"
    return prefix if replaced and not pre else None


def _tokens(content: dict[str, Any], size: int, kind: str) -> tuple[list[str], list[int]]:
    """Text and type of every id."""
    texts = {int(index): text for text, index in content["model"]["vocab"].items()}
    added = {int(entry["id"]): entry for entry in content.get("added_tokens") or []}
    unknown = content["model"].get("unk_token")
    tokens, types = [], []
    for index in range(max(size, 1 + max([*texts, *added]))):
        if index in added:
            tokens.append(str(added[index]["content"]))
            types.append(CONTROL if added[index].get("special") else USER_DEFINED)
        elif index in texts:
            tokens.append(texts[index])
            byte = kind == "llama" and len(texts[index]) == 6 and texts[index].startswith("<0x")
            types.append(BYTE if byte else NORMAL)
        else:
            tokens.append(f"[PAD{index}]")
            types.append(UNUSED)
        if kind == "llama" and tokens[-1] == unknown:
            types[-1] = UNKNOWN
    return tokens, types


def _scores(content: dict[str, Any], tokens: list[str]) -> list[float]:
    """A SentencePiece score for each token: the earlier its merge, the higher; what no merge makes comes last."""
    merges = content["model"].get("merges") or []
    ranks = {
        "".join(merge.split(" ", 1) if isinstance(merge, str) else merge): rank for rank, merge in enumerate(merges)
    }
    return [float(-ranks.get(token, len(ranks))) for token in tokens]
