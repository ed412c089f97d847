"""Every kind of tokenizer that is written into .gguf files, read by llama.cpp itself: the same ids for the same texts?

    make loaders, which runs it after run.py; or: python scripts/loaders/gguf_tokenizers.py [--out FILE.json]

Small tokenizers of each kind are trained on Python's help topics and written with the keys of
`compress.checkpoints.formats.gguf_tokenizer` into files without tensors. Exit 1 if any text is read otherwise.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".loaders" / "llamacpp" / "bin" / "python"
TEXTS = (
    "In 1851, Melville's whale cost $3.50; it's 12345 words -- \u00e9l\u00e8ve, na\u00efve.\n\n  Two  spaces.",
    "def f(x):\n    return x**2 + 10000\n",
    "I'LL don't we've\t\ttabs \U0001f600 \u4f60\u597d  end ",
    "x",
)
WORDS = (
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*"
    "|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
)
"""How Llama 3 splits text; Qwen 2 takes digits one by one."""
SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{value:02X}>" for value in range(256)]


def kinds() -> Iterator[tuple[str, Any]]:
    """(name, trained tokenizer) of each kind."""
    from tokenizers import Regex, normalizers, pre_tokenizers

    plain, inside = (pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=used) for used in (True, False))
    splits = {
        "gpt-2": plain,
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), plain]),
        "llama-bpe": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(WORDS), "isolated"), inside]),
        "qwen2": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(WORDS.replace("{1,3}", "")), "isolated"), inside]),
    }
    for name, split in splits.items():
        yield name, _trained(None, split, [])
    space = normalizers.Replace(" ", "\u2581")
    prepended = normalizers.Sequence([normalizers.Prepend("\u2581"), space])
    yield "pieces, a space before", _trained(prepended, None, BYTES)
    yield "pieces, none before", _trained(space, None, BYTES)
    metaspace = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="first", split=False)
    at_spaces = pre_tokenizers.Split(" ", "merged_with_previous")
    yield "pieces, none before, split at spaces", _trained(space, at_spaces, BYTES)
    yield "pieces by metaspace", _trained(None, metaspace, BYTES)


def _trained(normalizer: Any, split: Any, fallback: list[str]) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    more = {"unk_token": "<unk>", "byte_fallback": True, "fuse_unk": True} if fallback else {}
    tokenizer = Tokenizer(models.BPE(**more))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if split is not None:
        tokenizer.pre_tokenizer = split
    alphabet = [] if fallback else pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2300, special_tokens=SPECIAL + fallback, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([line for name in sorted(topics) for line in topics[name].split("\n")], trainer)
    # Bytes are pieces of the model; the trainer takes them for special tokens, which are never looked for in text.
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [each for each in content["added_tokens"] if each["content"] not in fallback]
    return Tokenizer.from_str(json.dumps(content))


def write_vocabulary(tokenizer: Any, folder: Path) -> Path:
    """A .gguf file with the tokenizer and no tensor."""
    import gguf

    from compress.checkpoints.formats.gguf_tokenizer import vocabulary_of

    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    vocabulary = vocabulary_of(folder, tokenizer.get_vocab_size())
    if vocabulary.left_out:
        raise SystemExit(f"{folder.name}: {vocabulary.left_out}")
    writer = gguf.GGUFWriter(folder / "vocabulary.gguf", "llama")
    vocabulary.add_to(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return folder / "vocabulary.gguf"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks" / "tokenizers.json")
    arguments = parser.parse_args()
    trained = dict(kinds())
    with tempfile.TemporaryDirectory() as scratch:
        files = {name: str(write_vocabulary(each, Path(scratch) / name)) for name, each in trained.items()}
        asked = json.dumps({"files": files, "texts": TEXTS})
        worker = Path(__file__).with_name("gguf_tokenizers_worker.py")
        done = subprocess.run([PYTHON, worker], input=asked, stdout=subprocess.PIPE, text=True, check=True)
    read = json.loads(done.stdout.splitlines()[-1])
    agree = {
        name: [
            each.encode(text, add_special_tokens=False).ids == ids for text, ids in zip(TEXTS, read[name], strict=True)
        ]
        for name, each in trained.items()
    }
    arguments.out.write_text(json.dumps(agree, indent=1) + "\n")
    print(json.dumps(agree, indent=1))
    return int(not all(map(all, agree.values())))


if __name__ == "__main__":
    sys.exit(main())
