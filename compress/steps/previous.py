"""The release before: what production leads to, else the newest version of the same name that passed."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from compress.artifacts.store import Store, Version
from compress.errors import CompressError
from compress.reports.changes import PreviousRecord
from compress.reports.previous import compare
from compress.reports.report import Report

CHANNEL = "production"


def against_previous(report: Report, store: Store) -> Report:
    """The report with what changed against the release before; the report itself where there was none.

    A release whose report cannot be read ends no run: what is wrong with it is said in the comparison's place.
    """
    try:
        version, chosen = previous_release(store, report.artifact.name, report.artifact.version)
    except CompressError as error:
        record = PreviousRecord(
            name=report.artifact.name, version="", path="", digest="", chosen=f"in {CHANNEL}", problem=str(error)
        )
        return report.model_copy(update={"previous": record})
    if version is None:
        return report
    try:
        record = compare(report, read_report(version.path), chosen)
    except (OSError, ValidationError) as error:
        problem = f"its report.json cannot be read ({type(error).__name__})"
        record = PreviousRecord(
            name=version.name, version=version.label, path=str(version.path), digest="", chosen=chosen, problem=problem
        )
    return report.model_copy(update={"previous": record})


def previous_release(store: Store, name: str, label: str) -> tuple[Version | None, str]:
    """(the release before version `label` of `name`, why that one). A version is never its own predecessor, and one
    that was published later is none either."""
    promoted = store.promoted(name, CHANNEL)
    if promoted is not None and promoted.label != label:
        return promoted, f"which {CHANNEL} leads to"
    passed = [version for version in store.versions(name) if not version.rejected]
    if not label.startswith("r"):
        passed = [version for version in passed if int(version.label[1:]) < int(label[1:])]
    return (passed[-1], "the newest version that had passed") if passed else (None, "")


def read_artifact(folder: Path) -> Report:
    """The report of an artifact, for whoever asks for it. Raises CompressError with a remedy."""
    path = folder / "reports" / "report.json"
    try:
        return read_report(folder)
    except OSError as error:
        remedy = "`compress verify` tells what is missing"
        raise CompressError(f"{path}: cannot be read ({error.strerror}); {remedy}") from error
    except ValidationError as error:
        raise CompressError(
            f"{path}: not a report that this version of compress knows ({_first(error)}); "
            "`compress verify` tells whether it was changed"
        ) from error


def _first(error: ValidationError) -> str:
    mistake = error.errors()[0]
    place = ".".join(map(str, mistake["loc"])) or "the file"
    return f"{place}: {mistake['msg']}"


def read_report(folder: Path) -> Report:
    """The report of an artifact. Raises OSError and pydantic's ValidationError."""
    return Report.model_validate_json((folder / "reports" / "report.json").read_bytes())
