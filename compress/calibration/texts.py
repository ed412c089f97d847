"""Documents by name: descriptors under calibration/*.yaml say where a text comes from, under which licence.

A recipe names a descriptor (`data: python-help`) or gives one inline. Kinds of source:

    hub               a Hugging Face data set, through `datasets`
    files             local JSONL, text or parquet, through `datasets`
    python-topics     the help topics every CPython carries (pydoc_data.topics)
    python-docstrings docstrings of the standard library, read with ast, nothing imported
    self-generated    text sampled from the model itself, for when no data may be used
"""

from __future__ import annotations

import ast
import glob
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field

from compress.errors import EnvironmentLacksError, RecipeError, nearest


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _Source(_Frozen):
    """Fields of every source. A stored recipe carries its texts inline, so that it runs from anywhere."""

    name: str = Field(default="", description="how reports name the text; by default the kind of source")
    licence: str = Field(default="", description="what may be done with the text")


class HubText(_Source):
    """A data set on the Hugging Face hub."""

    kind: Literal["hub"] = "hub"
    id: str
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    column: str = Field(default="text", description="a text column, or a column of chat messages")
    streaming: bool = Field(default=True, description="read only as many rows as are needed")


class FilesText(_Source):
    """Local files; `paths` may hold wildcards and start from the descriptor's or recipe's folder."""

    kind: Literal["files"] = "files"
    paths: tuple[str, ...] = Field(min_length=1)
    format: Literal["json", "text", "parquet"] | None = Field(default=None, description="by default from the suffix")
    column: str = Field(default="text", description="a text column, or a column of chat messages")
    hint: str = Field(default="", description="what to run if the files are missing")


class PythonTopics(_Source):
    """Help topics of the running CPython: nothing to download."""

    kind: Literal["python-topics"] = "python-topics"


class PythonDocstrings(_Source):
    """Docstrings of the running CPython's standard library: nothing to download, nothing imported."""

    kind: Literal["python-docstrings"] = "python-docstrings"


class SelfGenerated(_Source):
    """Text sampled from the source model, each document from the start token on."""

    kind: Literal["self-generated"] = "self-generated"
    temperature: float = Field(default=1.0, gt=0)
    batch_windows: int = Field(default=16, gt=0, description="windows sampled together")
    document_tokens: int | None = Field(
        default=None, ge=8, description="tokens of a document, of which a window holds as many as fit; a window's"
    )


TextSource = Annotated[
    HubText | FilesText | PythonTopics | PythonDocstrings | SelfGenerated, Field(discriminator="kind")
]


class Descriptor(_Frozen):
    """What a named text is, and what may be done with it."""

    name: str
    description: str = ""
    licence: str = ""
    source: TextSource


Document = str | list[dict[str, Any]]
"""Plain text, or chat messages."""


OWN_DESCRIPTORS = Path(__file__).resolve().parent.parent.parent / "calibration"


def descriptor_folders(base: Path) -> list[Path]:
    """Where descriptors are looked for: beside the recipe, in the working directory, then the project's own."""
    return [base / "calibration", base.parent / "calibration", Path.cwd() / "calibration", OWN_DESCRIPTORS]


def known_descriptors(base: Path) -> dict[str, Path]:
    """Descriptor files by name; the nearest folder wins."""
    found: dict[str, Path] = {}
    for folder in descriptor_folders(base):
        for path in sorted(folder.glob("*.yaml")):
            found.setdefault(path.stem, path)
    return found


def load_descriptor(name: str, base: Path) -> tuple[Descriptor, Path]:
    """A named descriptor and the folder its relative paths start from."""
    known = known_descriptors(base)
    if name not in known:
        raise RecipeError(f"no text is called {name!r}.{nearest(name, known)} Known: {', '.join(known) or 'none'}.")
    path = known[name]
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
        return Descriptor.model_validate({"name": name, **value}), path.parent
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise RecipeError(f"{path}: not a valid text descriptor: {error}") from error


def documents(source: TextSource, base: Path) -> Iterator[Document]:
    """The documents of a text, in a fixed order. Raises if the text is not here or has no such column."""
    if isinstance(source, PythonTopics):
        yield from _topics()
    elif isinstance(source, PythonDocstrings):
        yield from _docstrings()
    elif isinstance(source, FilesText):
        yield from _rows(_local(source, base), source.column, ", ".join(source.paths))
    elif isinstance(source, HubText):
        yield from _rows(_hub(source), source.column, source.id)
    else:
        raise AssertionError("self-generated text has no documents")


def missing(source: TextSource, base: Path) -> str | None:
    """Why a local text cannot be read, or None; cheap, for checks before work starts."""
    if isinstance(source, FilesText):
        try:
            _expand(source, base)
        except (RecipeError, EnvironmentLacksError) as error:
            return str(error)
    return None


def _topics() -> Iterator[str]:
    from pydoc_data import topics

    for name in sorted(topics.topics):
        yield topics.topics[name]


def _docstrings() -> Iterator[str]:
    """One document a module, its docstrings of 200 characters or more joined; test suites left out."""
    library = Path(sysconfig.get_paths()["stdlib"])
    skipped = ("site-packages", "test", "tests", "idle_test", "lib2to3", "pydoc_data", "__pycache__")
    for path in sorted(library.rglob("*.py")):
        if any(part in skipped for part in path.relative_to(library).parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        nodes = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        texts = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, nodes)]
        long = [text for text in texts if len(text) >= 200]
        if long:
            yield "\n\n".join(long)


def _expand(source: FilesText, base: Path) -> list[str]:
    found: list[str] = []
    for pattern in source.paths:
        path = str(base / Path(pattern).expanduser())
        matches = sorted(glob.glob(path))
        if not matches:
            hint = f" {source.hint}" if source.hint else ""
            raise RecipeError(f"text file {path} does not exist.{hint}")
        found += matches
    return found


def _local(source: FilesText, base: Path) -> Any:
    import datasets

    paths = _expand(source, base)
    suffix = Path(paths[0]).suffix.lstrip(".")
    kinds = {"jsonl": "json", "json": "json", "txt": "text", "md": "text", "parquet": "parquet"}
    kind = source.format or kinds.get(suffix)
    if kind is None:
        raise RecipeError(f"{paths[0]}: cannot tell the format from the suffix; set format: json, text or parquet.")
    extra = {"sample_by": "document"} if kind == "text" else {}
    try:
        return datasets.load_dataset(kind, data_files=paths, split="train", streaming=True, **extra)
    except Exception as error:
        raise RecipeError(f"{', '.join(source.paths)}: cannot be read as {kind} ({error}).") from error


def _hub(source: HubText) -> Any:
    import datasets

    try:
        return datasets.load_dataset(
            source.id, source.config, split=source.split, revision=source.revision, streaming=source.streaming
        )
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise EnvironmentLacksError(
            f"data set {source.id} cannot be fetched: {first} Check the id and the network, or name a local text."
        ) from error


def _rows(rows: Any, column: str, where: str) -> Iterator[Document]:
    try:
        for row in rows:
            if column not in row:
                raise RecipeError(f"{where}: no column {column!r}.{nearest(column, row)} Columns: {', '.join(row)}.")
            value = row[column]
            if value:
                yield value
    except RecipeError:
        raise
    except Exception as error:
        raise RecipeError(f"{where}: cannot be read ({type(error).__name__}: {error}).") from error


def interpreter() -> str:
    """Texts that Python carries change with it: part of a ledger's provenance."""
    return f"CPython {sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro}"
