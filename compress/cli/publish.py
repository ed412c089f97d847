"""`compress publish`: the model of an artifact to the Hugging Face hub."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from compress.cli.options import DEFAULT_STORE, JsonOption, ReferenceArgument, StoreOption


def publish(
    reference: ReferenceArgument,
    repo_id: Annotated[str, typer.Argument(help="OWNER/NAME on the hub; made if it is missing.", metavar="REPO_ID")],
    private: Annotated[
        bool, typer.Option("--private", help="Make the repository private; refused where it is public already.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only check, and list what would be uploaded.")] = False,
    rejected_too: Annotated[
        bool, typer.Option("--rejected-too", help="Also a version whose gates did not all pass; its card says so.")
    ] = False,
    store: StoreOption = DEFAULT_STORE,
    json: JsonOption = False,
) -> int:
    """Upload model/ of an artifact, with its model card, to the Hugging Face hub.

    Needs a token (exit code 7 without one). The files are hashed again first.
    """
    from compress import console
    from compress.artifacts.store import Store
    from compress.steps.publishing import check_whole, prepare, upload

    folder = Store(store).find(reference)
    planned = prepare(folder, repo_id, private, rejected_too)
    progress, url = console.StageProgress(), None
    if dry_run:
        check_whole(planned, progress)
    else:
        url = upload(planned, progress)
    if json:
        facts: dict[str, Any] = {
            "artifact": planned.reference,
            "verdict": planned.verdict,
            "repo_id": planned.repo_id,
            "private": planned.private,
            "dry_run": dry_run,
            "bytes": planned.bytes,
            "files": [{"path": path, "bytes": size} for path, size in planned.files],
            "url": url,
        }
        console.print_json(facts)
        return 0
    if dry_run:
        rows = [[path, console.bytes_text(size)] for path, size in planned.files]
        console.print_table(f"{planned.reference} ({planned.verdict}) to {repo_id}", ["file", "size"], rows)
    word = "would upload" if dry_run else "uploaded"
    console.print_line(f"{word} {len(planned.files)} files, {console.bytes_text(planned.bytes)}: {url or repo_id}")
    return 0
