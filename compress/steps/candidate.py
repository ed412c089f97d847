"""The model that is judged: a run's export, or whatever `compress eval` is pointed at."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from compress.artifacts import manifest
from compress.artifacts.store import Store
from compress.calibration.texts import SelfGenerated
from compress.calibration.window_specs import CalibrationSpec
from compress.calibration.windows import build_windows
from compress.checkpoints.export import stored_dtype
from compress.checkpoints.folder import tokenizer_files
from compress.checkpoints.foreign import readable_as, write_dense
from compress.checkpoints.formats import FORMATS
from compress.checkpoints.formats.gguf import FILE as GGUF_FILE
from compress.checkpoints.formats.gguf import effective_bits, tensor_bytes
from compress.checkpoints.reader import Checkpoint
from compress.checkpoints.sources import ModelSpec, cached_source, converted_gguf, resolve
from compress.errors import CompressError, RecipeError, nearest
from compress.events import OF_MAKING, Event, Progress, count_by_kind
from compress.files import sha256_of
from compress.recipe import Recipe, load_recipe
from compress.reports.report import ArtifactRef
from compress.steps.source import OpenedSource, check_complete, load_tokenizer
from compress.steps.texts import Texts


@dataclass(frozen=True)
class Found:
    """What a name on the command line stands for. `artifact` is the folder around the model, if it was published."""

    text: str
    spec: ModelSpec
    artifact: Path | None = None


@dataclass(frozen=True)
class Asked:
    """What to judge, and what to compare it with in place of the recipe's source."""

    model: Found
    against: Found | None = None


@dataclass(frozen=True)
class Candidate:
    """A model folder to be judged."""

    noun: str
    """What progress calls it."""
    folder: Path
    """What its public loader takes."""
    checkpoint: Checkpoint
    """What is measured: the same folder, or its weights written out."""
    files: Checkpoint | None
    """The files as they lie there; None for a .gguf."""
    stored_bytes: int
    """Bytes of tensors as it is handed around: of the packed files, not of what they were written out to."""
    digest: str
    tokenizer: Any = None
    """None: the folder's own, loaded when it is needed."""
    name: str = ""
    version: str = ""
    recorded: dict[str, int] | None = None
    """Events of its making by kind, where it brings a report that tells; empty where they are among a run's own."""
    calibration: CalibrationSpec | None = None
    """What it was calibrated on, where that is known; without what was sampled from the model."""
    calibration_digest: str | None = None
    """Of the windows it was calibrated on, as its manifest recorded it."""
    loader_lacks: tuple[str, ...] = ()
    """Packages without which its public loader cannot load it."""
    effective_bits: float | None = None
    """Of a .gguf, whose tensors are not looked at here."""
    events: tuple[Event, ...] = field(default=())

    @property
    def is_read_directly(self) -> bool:
        """Whether our reading and its loader's can be held against each other to rounding."""
        return self.checkpoint.folder == self.folder and not self.loader_lacks

    @cached_property
    def loadable(self) -> Path:
        """What writes text: the folder, or a copy of the cache with the weights written out where its loader is not
        here. Made when it is first asked for."""
        return _written_out(self.checkpoint) if self.loader_lacks else self.folder

    @property
    def artifact(self) -> ArtifactRef:
        """How a report refers to it."""
        return ArtifactRef(path=str(self.folder), name=self.name, version=self.version, digest=self.digest)

    def calibrated(self, recipe: Recipe) -> Recipe:
        """The recipe with the calibration text of this model, so that overlap is looked for where it could be."""
        return recipe.model_copy(update={"calibration": self.calibration})

    def counts(self, events: list[Event]) -> dict[str, int]:
        """Events by kind: of judging it, and of its making where that is recorded; else those kinds are absent."""
        judging = {kind: count for kind, count in count_by_kind(events).items() if kind not in OF_MAKING}
        made = {kind: count for kind, count in count_by_kind(events).items() if kind in OF_MAKING}
        if self.recorded is None:
            return judging
        return judging | {kind: count + self.recorded.get(kind, 0) for kind, count in made.items()}


def exported(folder: Path, stored_bytes: int, progress: Progress) -> Candidate:
    """A run's own export, `stored_bytes` of tensors. Its digest is taken when it is published."""
    if (folder / GGUF_FILE).is_file():
        path = folder / GGUF_FILE
        read = converted_gguf(path, sha256_of(path), progress)
        return Candidate(
            "export", read, Checkpoint(read), None, stored_bytes, "", recorded={}, effective_bits=effective_bits(path)
        )
    checkpoint = Checkpoint(folder)
    lacks = _lacks(checkpoint)
    return Candidate(
        "export", folder, checkpoint, checkpoint, checkpoint.weight_bytes, "", recorded={}, loader_lacks=lacks
    )


def _lacks(checkpoint: Checkpoint) -> tuple[str, ...]:
    """What transformers would need to load a folder that is read here, and is not installed."""
    method = (checkpoint.config.get("quantization_config") or {}).get("quant_method")
    format_ = FORMATS.get(str(method))
    return format_.loader_lacks() if format_ is not None and checkpoint.is_understood else ()


def _written_out(checkpoint: Checkpoint) -> Path:
    """The same weights as a plain folder of the cache: what writes text where the format's own loader is not here."""
    stored = stored_dtype(checkpoint.config, "auto", checkpoint.architecture.float16_safe)
    name = f"written-{checkpoint.digest()[:24]}"
    return cached_source(name, lambda target: _write_plain(checkpoint, target, stored))


def _write_plain(checkpoint: Checkpoint, target: Path, stored: torch.dtype) -> None:
    FORMATS["plain"].write(checkpoint, target, stored, 5 * 10**9)


def find_model(text: str, store: Path) -> Found:
    """What a MODEL on the command line means: an artifact of the store, a folder or .gguf file, or a hub id. Raises
    RecipeError naming the nearest artifact, and CompressError for one whose files are not those that were published."""
    path = Path(text).expanduser()
    if (path / manifest.MANIFEST_NAME).is_file():
        return _artifact(text, path.resolve())
    if path.exists():
        inside = path.resolve()
        published = inside.name == manifest.MODEL_FOLDER and (inside.parent / manifest.MANIFEST_NAME).is_file()
        return _artifact(text, inside.parent) if published else Found(text, ModelSpec(path=inside))
    if "/" not in text:
        opened = Store(store)
        names = opened.names()
        if text.partition("@")[0] not in names:
            raise RecipeError(
                f"{text}: neither a file or folder here, nor an artifact of the store {opened.root}."
                f"{nearest(text.partition('@')[0], names)} Hub ids have a slash."
            )
        return _artifact(text, opened.find(text))
    if text.startswith((".", "/", "~")) or text.count("/") > 1:
        raise RecipeError(f"{text}: there is no such file or folder.")
    hub, _, revision = text.partition("@")
    return Found(text, ModelSpec(hub=hub, revision=revision or None))


def _artifact(text: str, folder: Path) -> Found:
    if manifest.model_digest(folder) != manifest.read(folder).model_digest:
        raise CompressError(
            f"{folder}: the model's files are not those that were published; `compress verify {folder}` tells which."
        )
    model = folder / manifest.MODEL_FOLDER
    return Found(text, ModelSpec(path=model / GGUF_FILE if (model / GGUF_FILE).is_file() else model), folder)


def open_candidate(found: Found, tokenizer: Any, progress: Progress) -> Candidate:
    """Open a model to be judged; `tokenizer` stands in where it has none. Raises CompressError for what cannot be read,
    is not whole, or quantises activations."""
    source = resolve(found.spec, Path.cwd(), progress)
    is_gguf = "gguf_sha256" in source.facts
    files = Checkpoint(source.folder)
    measured, events = _measured(files, found, progress)
    check_complete(measured)
    own = any(path.name.startswith("tokenizer") for path in tokenizer_files(source.folder))
    if not own:
        message = "the judged model brings no tokenizer; the source's was used"
        events.append(Event("tokenizer_borrowed", found.text, message))
    recorded, calibration, unknown = _making(found.artifact)
    if unknown:
        events.append(Event("calibration_unknown", found.text, unknown))
    published = manifest.read(found.artifact) if found.artifact else None
    lacks = () if is_gguf else _lacks(files)
    return Candidate(
        noun="judged model",
        folder=source.folder,
        loader_lacks=lacks,
        checkpoint=measured,
        files=None if is_gguf else files,
        stored_bytes=tensor_bytes(Path(source.facts["path"])) if is_gguf else files.weight_bytes,
        effective_bits=effective_bits(Path(source.facts["path"])) if is_gguf else None,
        digest=source.facts.get("gguf_sha256") or (published.model_digest if published else files.digest()),
        tokenizer=load_tokenizer(source.folder) if own else tokenizer,
        name=published.name if published else source.folder.name if not is_gguf else Path(found.text).name,
        version=published.version if published else "",
        recorded=recorded,
        calibration=calibration and calibration.of_text,
        calibration_digest=_text_digest(found.artifact) if found.artifact else None,
        events=tuple(events),
    )


def _measured(files: Checkpoint, found: Found, progress: Progress) -> tuple[Checkpoint, list[Event]]:
    """The folder our reader takes in place of `files`, and the event where that is another one."""
    if readable_as(files) == "itself":
        return files, []
    name = f"dense-{files.digest()[:24]}"
    folder = cached_source(name, lambda target: write_dense(files.folder, target, progress))
    method = files.config["quantization_config"]["quant_method"]
    message = f"weights in the format {method} were read through its own loader, each by what it does to the identity"
    return Checkpoint(folder), [Event("read_through_loader", found.text, message)]


def _making(artifact: Path | None) -> tuple[dict[str, int] | None, CalibrationSpec | None, str]:
    """Events of its making, its calibration text, and why overlap with that cannot be checked, if it cannot."""
    if artifact is None:
        return None, None, "the model brings no record of its making, so nobody knows what it was calibrated on"
    recorded = _recorded_events(artifact)
    try:
        calibration = load_recipe(artifact / "recipe.yaml").calibration
    except CompressError as error:
        return recorded, None, f"its calibration text is not here ({str(error).splitlines()[0]})"
    if calibration and isinstance(calibration.descriptor(Path.cwd())[0].source, SelfGenerated):
        return recorded, None, "its calibration text was sampled from the model, and was not sampled again"
    if calibration and calibration.self_generated_windows:
        return recorded, calibration, "what of its calibration text was sampled from the model was not sampled again"
    return recorded, calibration, ""


def _recorded_events(artifact: Path) -> dict[str, int]:
    """Event counts of a published report. Raises CompressError for a report that is not the one that was published."""
    return {str(kind): int(count) for kind, count in _report(artifact)["event_counts"].items()}


def _text_digest(artifact: Path) -> str | None:
    """Digest of the calibration windows that were read, without those that were sampled beside them."""
    ledger = _report(artifact)["calibration"]
    found: str | None = ledger.get("texts", [ledger])[0].get("digest")
    return found


def _report(artifact: Path) -> dict[str, Any]:
    """A published report. Raises CompressError for one that is not what was published."""
    path = artifact / "reports" / "report.json"
    published = {entry.path: entry.sha256 for entry in manifest.read(artifact).files}
    try:
        if manifest.hash_file(path) != published.get("reports/report.json"):
            raise ValueError("it is not the one that was published")
        report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if not all(isinstance(report[part], dict) for part in ("event_counts", "calibration")):
            raise ValueError("parts of it are missing")
        return report
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CompressError(f"{path}: cannot be read ({error}); `compress verify {artifact}` tells more.") from error


def calibration_events(candidate: Candidate, texts: Texts) -> list[Event]:
    """The event that overlap was looked for in another text than the one it was calibrated on, if that is so."""
    found, recorded = texts.calibration, candidate.calibration_digest
    if found is None or recorded is None or found.digest == recorded:
        return []
    message = "its calibration text has changed since: the windows read now are not those it was calibrated on"
    return [Event("calibration_unknown", candidate.name, message, {"recorded": recorded, "found": found.digest})]


def check_comparable(recipe: Recipe, candidate: Candidate, reference: OpenedSource, texts: Texts) -> None:
    """Both models must read the same tokens and predict over the same vocabulary. Raises RecipeError naming every text
    that would be read differently."""
    sizes = [int(checkpoint.config["vocab_size"]) for checkpoint in (candidate.checkpoint, reference.checkpoint)]
    if sizes[0] != sizes[1]:
        raise RecipeError(
            f"{candidate.folder} predicts over {sizes[0]} tokens, what it is compared with over {sizes[1]}: "
            "probabilities of different vocabularies cannot be compared."
        )
    if candidate.tokenizer is reference.tokenizer:
        return
    different = []
    for name in texts.evaluation:
        windows = texts.seen(name, 1 + len(texts.more.get(name, ())))
        spec = next(spec for spec in recipe.on_text if spec.set_name == name)
        again = build_windows(spec.window_spec, Path.cwd(), candidate.tokenizer, recipe.seed, f"evaluation set {name}")
        if again.distinct(name).part(0, len(windows.ids)).digest != windows.digest:
            different.append(f"{name}: the tokenizer of {candidate.folder} reads this text as other tokens")
    if different:
        raise RecipeError(different)
