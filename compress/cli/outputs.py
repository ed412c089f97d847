"""What a command leaves for CI beside its own output: JUnit XML, and what GitHub Actions shows."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from compress.errors import RecipeError, ResourceError

if TYPE_CHECKING:
    from compress.reports.report import Report

JunitOption = Annotated[Path | None, typer.Option("--junit", help="Also write the gates as JUnit XML to this file.")]
GithubOption = Annotated[
    bool,
    typer.Option("--github", help="Annotations for GitHub Actions on stderr, a summary in $GITHUB_STEP_SUMMARY."),
]
SUMMARY_VARIABLE = "GITHUB_STEP_SUMMARY"


@dataclass(frozen=True)
class Outputs:
    """Where to write to. Made before the work starts, so that what cannot be written ends the command at once."""

    junit: Path | None
    github: bool

    def __post_init__(self) -> None:
        if self.junit is None:
            return
        if self.junit.is_dir():
            raise RecipeError(f"--junit {self.junit}: this is a folder; name a file.")
        try:
            self.junit.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ResourceError(f"--junit {self.junit}: its folder cannot be made ({error}).") from error
        if not os.access(self.junit if self.junit.exists() else self.junit.parent, os.W_OK):
            raise ResourceError(f"--junit {self.junit}: cannot be written here.")
        # What an earlier command left would be read as this one's, should this one end in an error.
        self.junit.unlink(missing_ok=True)

    def write(self, report: Report, where: Path | None) -> None:
        """All of them. where: the HTML report, if it was written."""
        from compress import console
        from compress.reports.github import of_gates, summary
        from compress.reports.junit import render_junit

        if self.junit is not None:
            self.junit.write_text(render_junit(report), encoding="utf-8", newline="\n")
        if not self.github:
            return
        console.print_commands(of_gates(report))
        path = os.environ.get(SUMMARY_VARIABLE)
        if not path:
            console.note(f"--github: {SUMMARY_VARIABLE} is not set, so no summary was written")
            return
        try:
            with Path(path).open("a", encoding="utf-8") as stream:
                stream.write(summary(report, str(where) if where else "not written"))
        except OSError as error:
            console.note(f"--github: {SUMMARY_VARIABLE} names {path}, which cannot be written ({error})")
