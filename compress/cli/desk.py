"""`compress promote`, `rollback`, `waive`, `waivers` and `history`: the release desk."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compress.cli.options import DEFAULT_STORE, JsonOption, StoreOption
from compress.errors import RecipeError

if TYPE_CHECKING:
    from compress.artifacts.desk import Moved
    from compress.artifacts.waivers import Waiver

NameArgument = Annotated[str, typer.Argument(help="Name of the artifact; NAME@v0003 names the version too.")]
VersionArgument = Annotated[str | None, typer.Argument(help="v0003, or r0001 for a rejected run.", metavar="VERSION")]
ByOption = Annotated[str | None, typer.Option("--by", help="Who does this.", show_default="the login name")]
NoteOption = Annotated[str | None, typer.Option("--note", help="A sentence for the history.")]
QuickOption = Annotated[
    bool, typer.Option("--quick", help="Compare sizes instead of hashing every file; the history says so.")
]


def promote(
    name: NameArgument,
    version: VersionArgument = None,
    to: Annotated[str, typer.Option("--to", help="The channel: staging or production.")] = ...,  # type: ignore[assignment]
    by: ByOption = None,
    note: NoteOption = None,
    quick: QuickOption = False,
    store: StoreOption = DEFAULT_STORE,
    json: JsonOption = False,
) -> int:
    """Put a version into a channel, a file that deploy jobs read.

    Refused (exit 3) unless its gates passed or waivers cover those that did not; refused (exit 1) if it is damaged.
    """
    from compress.artifacts import desk
    from compress.artifacts.store import Store

    name, label = split(name, version)
    _print_moved(desk.promote(Store(store), name, label, to, by, note, quick), store, json)
    return 0


def rollback(
    name: Annotated[str, typer.Argument(help="Name of the artifact.")],
    channel: Annotated[str, typer.Option("--channel", help="staging or production.")] = ...,  # type: ignore[assignment]
    to: Annotated[
        str | None, typer.Option("--to", metavar="VERSION", help="Go to this version instead of the one before.")
    ] = None,
    by: ByOption = None,
    note: NoteOption = None,
    quick: QuickOption = False,
    store: StoreOption = DEFAULT_STORE,
    json: JsonOption = False,
) -> int:
    """Let a channel go back to the version it held before. Refused if that is damaged or no longer allowed."""
    from compress.artifacts import desk
    from compress.artifacts.store import Store

    _print_moved(desk.rollback(Store(store), name, channel, to, by, note, quick), store, json)
    return 0


def waive(
    name: NameArgument,
    version: VersionArgument = None,
    gate: Annotated[
        list[str], typer.Option("--gate", help="KIND, MEASURE or KIND:MEASURE of a gate that did not pass; repeat it.")
    ] = ...,  # type: ignore[assignment]
    reason: Annotated[str, typer.Option("--reason", help="Why it may be released all the same.")] = ...,  # type: ignore[assignment]
    until: Annotated[str, typer.Option("--until", metavar="DATE", help="Last day on which it counts.")] = ...,  # type: ignore[assignment]
    by: ByOption = None,
    sign_with: Annotated[
        Path | None, typer.Option("--sign-with", metavar="SSH_KEY", help="Sign with this key through ssh-keygen.")
    ] = None,
    gpg_key: Annotated[str | None, typer.Option("--gpg-key", metavar="ID", help="Sign with this key of gpg.")] = None,
    store: StoreOption = DEFAULT_STORE,
    json: JsonOption = False,
) -> int:
    """Answer for gates of a version that did not pass, with a reason and an end. Kept in the history for ever.

    Where the store has a file allowed_signers, only those in it can waive.
    """
    from compress import console
    from compress.artifacts import desk
    from compress.artifacts.store import Store
    from compress.artifacts.words import visible

    name, label = split(name, version)
    made = desk.waive(Store(store), name, label, gate, reason, until, by, sign_with, gpg_key)
    if json:
        console.print_json(waiver_values(made))
    else:
        signed = f"signed by {made.signed_by}" if made.signed_by else "not signed"
        console.print_line(f"{visible(made.who)} waives {', '.join(made.gates)} of {name}@{made.label}; {signed}.")
        console.print_line(f"It counts until {made.until:%Y-%m-%d %H:%M} UTC.")
    return 0


def waivers(
    name: NameArgument,
    version: VersionArgument = None,
    store: StoreOption = DEFAULT_STORE,
    json: JsonOption = False,
) -> int:
    """List every waiver ever given to a name or one version, and whether it counts; if not, why."""
    from compress import console
    from compress.artifacts import desk, layout
    from compress.artifacts.store import Store
    from compress.artifacts.waivers import of_history
    from compress.artifacts.words import visible_row

    name, _, after = name.partition("@")
    opened = Store(store)
    known(opened, name)
    label = version or after or None
    found = of_history(opened.history(name), (layout.whole_label(label) or label) if label else None)
    reasons = [desk.why_not(opened, waiver) for waiver in found]
    if json:
        rows = [
            {**waiver_values(waiver), "counts": not reason, "why_not": reason or None}
            for waiver, reason in zip(found, reasons, strict=True)
        ]
        console.print_json(rows)
    elif not found:
        console.print_line(f"Nothing of {name}{f'@{label}' if label else ''} was ever waived.")
    else:
        cells = [
            visible_row(
                [
                    waiver.label,
                    reason or "counts",
                    f"{waiver.until:%Y-%m-%d}",
                    waiver.who,
                    ", ".join(waiver.gates),
                    waiver.reason,
                    waiver.signed_by or "-",
                ]
            )
            for waiver, reason in zip(found, reasons, strict=True)
        ]
        console.print_table(name, ["version", "now", "until", "by", "gates", "reason", "signed by"], cells)
    return 0


def history(
    name: Annotated[str, typer.Argument(help="Name of the artifact.")],
    last: Annotated[int | None, typer.Option("--last", metavar="N", min=1, help="Only the last N lines.")] = None,
    store: StoreOption = DEFAULT_STORE,
    json: JsonOption = False,
) -> int:
    """Show what happened to a name, in order. Exit 1 if lines were changed, removed or moved."""
    from compress import console
    from compress.artifacts.store import Store
    from compress.artifacts.words import visible, visible_row

    opened = Store(store)
    known(opened, name)
    past = opened.history(name)
    told = past.lines[-last:] if last else past.lines
    if json:
        lines = [line.model_dump(mode="json", exclude_none=True) for line in told]
        console.print_json({"name": name, "ok": not past.problems, "problems": past.problems, "lines": lines})
    elif not past.lines:
        console.print_line(
            f"{name} has no history yet: its versions are older. The next command that changes it begins."
        )
    else:
        cells = [
            visible_row(
                [
                    str(line.seq),
                    f"{line.at:%Y-%m-%d %H:%M:%S}",
                    line.who,
                    line.event,
                    line.version or "",
                    "; ".join(part for part in (line.detail, line.note) if part),
                ]
            )
            for line in told
        ]
        console.print_table(name, ["line", "at (UTC)", "who", "event", "version", "detail"], cells)
    if not json:
        for problem in past.problems:
            console.print_error(visible(problem))
    return 1 if past.problems else 0


def split(name: str, version: str | None) -> tuple[str, str]:
    """NAME VERSION or NAME@VERSION. Raises RecipeError for neither, or both."""
    name, _, after = name.partition("@")
    if version and after and version != after:
        raise RecipeError(f"{name}@{after} and {version}: name one version")
    label = version or after
    if not label:
        raise RecipeError(f"which version of {name}? Name it: {name} v0001. `compress list {name}` shows all.")
    return name, label


def known(store: Any, name: str) -> None:
    """Raises RecipeError for a name of which the store knows nothing: no version, and no history either."""
    from compress.errors import nearest

    if not store.versions(name) and not store.history(name).path.exists():
        raise RecipeError(f'There is no "{name}" in the store {store.root}.{nearest(name, store.names())}')


def waiver_values(waiver: Waiver) -> dict[str, Any]:
    """A waiver as JSON values."""
    return {
        **waiver.value.model_dump(mode="json"),
        "signed_by": waiver.signed_by,
        "expired": waiver.expired(datetime.now(UTC)),
        "line": waiver.line,
    }


def _print_moved(moved: Moved, store: Path, json: bool) -> None:
    from compress import console
    from compress.artifacts.words import visible

    channel = moved.channel
    if json:
        values = channel.model_dump(mode="json", by_alias=True)
        waived = [waiver_values(waiver) for waiver in moved.waived_by]
        console.print_json({**values, "before": moved.before, "changed": moved.changed, "waivers": waived})
        return
    if not moved.changed:
        since = f"{channel.since:%Y-%m-%d %H:%M} UTC"
        console.print_line(f"{channel.channel} of {channel.name} holds {channel.version} already, since {since}.")
        return
    console.print_line(
        f"{channel.channel} of {channel.name} holds {channel.version} now; before: {moved.before or 'nothing'}."
    )
    for waiver in moved.waived_by:
        allowed = f"Allowed by {waiver.who} until {waiver.until:%Y-%m-%d}: {waiver.reason}"
        console.print_line(visible(allowed))
    console.print_line(f"{store / channel.name / 'channels' / channel.channel}.json")
