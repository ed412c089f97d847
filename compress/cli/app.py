"""The Typer application, and the one place where errors become exit codes."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import traceback
from typing import Annotated

import typer

try:  # newer typers carry a click of their own; with older ones the errors are click's
    from typer._click import exceptions as usage
except ImportError:
    from click import exceptions as usage  # type: ignore[no-redef]

from compress import __version__, parallel
from compress.cli import collect, desk, init, inspect, publish, recipes, report, run, site, transport
from compress.cli import diff as comparing
from compress.cli import eval as judging
from compress.cli import export as exporting
from compress.cli import frontier as mapping
from compress.errors import CompressError, ExitCode, RecipeError, nearest

app = typer.Typer(
    name="compress",
    help="Make a Hugging Face model smaller, judge the result against gates, publish it with its evidence.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
)


QUIET = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TQDM_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "true",
}
"""Other libraries read these when they are imported: their bars and warnings would bury our progress."""


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    if version:
        typer.echo(f"compress {__version__}")
        raise typer.Exit


app.command("run")(run.run)
app.command("plan")(run.plan)
app.command("eval")(judging.eval_)
app.command("frontier")(mapping.frontier)
app.command("export")(exporting.export)
app.command("init")(init.init)
app.command("validate")(recipes.validate)
app.command("kinds")(recipes.kinds)
app.command("schema")(recipes.schema)
app.command("list")(inspect.list_)
app.command("show")(inspect.show)
app.command("verify")(inspect.verify)
app.command("report")(report.report)
app.command("publish")(publish.publish)
app.command("site")(site.site)
app.command("diff")(comparing.diff)
app.command("promote")(desk.promote)
app.command("rollback")(desk.rollback)
app.command("waive")(desk.waive)
app.command("waivers")(desk.waivers)
app.command("history")(desk.history)
app.command("push")(transport.push)
app.command("pull")(transport.pull)
app.command("gc")(collect.gc)


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the `compress` command."""
    sys.exit(int(guarded(sys.argv[1:] if arguments is None else arguments)))


def guarded(arguments: list[str]) -> int:
    """Run a command and turn every ending into an exit code, a message on stderr, and with --json a document."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        code = int(app(arguments, standalone_mode=False) or ExitCode.PASSED)
        if code == ExitCode.INTERRUPTED:  # typer swallows the KeyboardInterrupt and returns its code
            raise KeyboardInterrupt
        return code
    except usage.NoArgsIsHelpError as error:
        print(error.ctx.get_help() if error.ctx else "")
        return ExitCode.BAD_RECIPE
    except BaseException as error:
        if isinstance(error, SystemExit | GeneratorExit):
            raise
        code, mistakes = _explain(error)
        if code == ExitCode.INTERNAL_ERROR and not isinstance(error, CompressError):
            traceback.print_exc()
        leads = not parallel.started_to_follow()
        try:
            _report(code, mistakes, as_json="--json" in arguments and leads, github="--github" in arguments and leads)
        except OSError:
            _give_up_stdout()
        return code


def _explain(error: BaseException) -> tuple[ExitCode, list[str]]:
    """The exit code of an error, and what to tell the user."""
    if isinstance(error, usage.UsageError):
        return ExitCode.BAD_RECIPE, [_usage(error)]
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        return ExitCode.INTERRUPTED, [
            "interrupted. Finished blocks are kept: the same command goes on where this one stopped."
        ]
    if isinstance(error, RecipeError):
        return error.exit_code, error.mistakes
    if isinstance(error, CompressError):
        return error.exit_code, [str(error)]
    if isinstance(error, MemoryError):
        remedy = "Use fewer calibration windows or a larger machine; `compress plan` predicts."
        return ExitCode.OUT_OF_RESOURCES, [f"out of memory. {remedy}"]
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        place = error.filename or "what was being written, a file or stdout"
        return ExitCode.OUT_OF_RESOURCES, [f"{place}: no space is left there; free some or write elsewhere"]
    if _out_of_device_memory(error):
        return ExitCode.OUT_OF_RESOURCES, [f"out of device memory: {error}"]
    return ExitCode.INTERNAL_ERROR, [
        f"internal error: {type(error).__name__}: {error}. This is a defect of compress; report it."
    ]


def _report(code: ExitCode, mistakes: list[str], as_json: bool, github: bool) -> None:
    from compress import console

    heading = [f"{len(mistakes)} mistakes:"] if len(mistakes) > 1 else []
    console.print_error("\n".join([*heading, *mistakes]))
    if github:
        from compress.reports import github as actions

        console.print_commands(actions.of_mistakes(code.name, mistakes))
    if as_json:
        console.print_json({"error": {"class": code.name.lower(), "exit_code": int(code), "messages": mistakes}})


def _give_up_stdout() -> None:
    """Nobody reads it, or it cannot be written: the message is on stderr, and Python is not to try again at its end."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _usage(error: usage.UsageError) -> str:
    message = error.format_message()
    if isinstance(error, usage.NoSuchOption):
        return message
    if "No such command" in message:
        name = message.split("'")[1] if "'" in message else ""
        if "Did you mean" not in message:
            message += nearest(name, [command.name or "" for command in app.registered_commands])
    return f"{message} See `compress --help`."


def _out_of_device_memory(error: BaseException) -> bool:
    """torch's CUDA error, and the CPU allocator's RuntimeError, without importing torch."""
    names = {cls.__name__ for cls in type(error).__mro__}
    return "OutOfMemoryError" in names or "can't allocate memory" in str(error)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt
