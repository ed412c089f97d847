"""`compress push` and `pull`: versions to and from any place that fsspec can open."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from compress.cli.options import DEFAULT_STORE, JsonOption, StoreOption

if TYPE_CHECKING:
    from compress.artifacts.transport import Moved

ByOption = Annotated[str | None, typer.Option("--by", help="Who does this.", show_default="the login name")]


def push(
    reference: Annotated[str, typer.Argument(help="NAME, NAME@v0003, NAME@r0001 or NAME@production.")],
    url: Annotated[str, typer.Argument(help="A folder, or a URL such as s3://bucket/models.", metavar="URL")],
    by: ByOption = None,
    store: StoreOption = DEFAULT_STORE,
    json: JsonOption = False,
) -> int:
    """Copy a version to a place elsewhere. The manifest goes last; the same command goes on after a crash.

    Checked before and read back after. A version that is there with other bytes is never replaced.
    """
    from compress.artifacts import transport
    from compress.artifacts.store import Store

    _print(transport.push(Store(store), reference, url, by, _told), "pushed to", json)
    return 0


def pull(
    url: Annotated[str, typer.Argument(help="URL/NAME@v0003, or the URL alone with NAME@v0003 after it.")],
    reference: Annotated[str | None, typer.Argument(help="NAME@v0003; NAME is the newest published version.")] = None,
    by: ByOption = None,
    store: StoreOption = DEFAULT_STORE,
    json: JsonOption = False,
) -> int:
    """Copy a version from a place elsewhere into the store, under the same label, if that is free."""
    from compress.artifacts import transport
    from compress.artifacts.store import Store

    _print(transport.pull(Store(store), url, reference, by, _told), "pulled from", json)
    return 0


def _told(text: str) -> None:
    """Progress. Paths come from a manifest that anybody may have written."""
    from compress import console
    from compress.artifacts.words import visible

    console.note(visible(text))


def _print(moved: Moved, what: str, json: bool) -> None:
    from compress import console

    version = moved.version
    if json:
        console.print_json(
            {
                "reference": version.reference,
                "path": str(version.path),
                "digest": moved.digest,
                "url": moved.url,
                "copied": moved.copied,
                "skipped": moved.skipped,
                "bytes": moved.bytes,
            }
        )
        return
    already = f"; {moved.skipped} files were there already" if moved.skipped else ""
    size = console.bytes_text(moved.bytes)
    console.print_line(f"{version.reference} {what} {moved.url}: {moved.copied} files, {size}{already}.")
