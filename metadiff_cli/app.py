"""The Typer app: registers the commands, and the one boundary that turns errors into messages and exit codes."""

import contextlib
import errno
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Sequence
from types import FrameType
from typing import Annotated

import typer

from metadiff_cli import __version__
from metadiff_cli.commands.adapt import command as adapt
from metadiff_cli.commands.evaluate import command as evaluate
from metadiff_cli.commands.look import command as look
from metadiff_cli.commands.parsing import Commands
from metadiff_cli.commands.train import command as train
from metadiff_cli.console import Screen
from metadiff_cli.errors import ConfigError, MetaDiffError, ProcessLost, Stopped, Told, exit_code
from metadiff_cli.files import without_home

SHARED = ("pretrain", "metatrain")  # commands that several processes can share

SMALLER = "lower --batch-size, or pretrain.batch or metatrain.batch with --set; or use --device cpu"

USE, TRAIN, LOOK = "Use", "Train and measure", "Look around"

app = Commands(
    name="metadiff",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.command("demo", rich_help_panel=USE)(adapt.demo)
app.command("adapt", rich_help_panel=USE)(adapt.adapt)
app.command("pretrain", rich_help_panel=TRAIN)(train.pretrain)
app.command("metatrain", rich_help_panel=TRAIN)(train.metatrain)
app.command("evaluate", rich_help_panel=TRAIN)(evaluate.evaluate)
app.command("export", rich_help_panel=USE)(look.export)
app.command("inspect", rich_help_panel=LOOK)(look.inspect)
app.command("card", rich_help_panel=USE)(look.card)
app.add_typer(look.presets, name="presets", rich_help_panel=LOOK)
app.add_typer(look.data, name="data", rich_help_panel=LOOK)
app.add_typer(look.config, name="config", rich_help_panel=LOOK)
app.add_typer(look.cache, name="cache", rich_help_panel=LOOK)
app.command("doctor", rich_help_panel=LOOK)(look.doctor)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"metadiff {__version__}")
        raise typer.Exit


@app.callback()
def root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Learn to classify images from a handful of examples per class.

    An implementation of MetaDiff: a diffusion model makes the classifier's
    weights from the examples.

    Examples:

      metadiff adapt --support ./imgs --query ./q

      metadiff metatrain --preset glyphs-5w1s
    """
    if (note := without_home()) is not None:
        Screen().note(note)
    command = context.invoked_subcommand
    if _world_size() > 1 and command not in SHARED:
        if os.environ.get("RANK") != "0":  # rank 0 tells
            raise typer.Exit(ConfigError.exit_code)
        raise ConfigError(f"{command} runs in one process", hint=f"type `metadiff {command}`, without torchrun")


def _world_size() -> int:
    """How many processes torchrun started; training joins them, this only counts."""
    size = os.environ.get("WORLD_SIZE", "")
    return int(size) if size.isdecimal() and all(map(os.environ.get, ("RANK", "MASTER_ADDR", "MASTER_PORT"))) else 1


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit code (see `errors`)."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    previous = signal.signal(signal.SIGTERM, _on_sigterm)
    try:
        _open_streams()
        result = app(args=given, prog_name="metadiff", standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except (BrokenPipeError, SystemExit) as error:
        return _left(error)
    except (Exception, KeyboardInterrupt, Stopped, Told) as error:
        return _told(error, given)
    finally:
        signal.signal(signal.SIGTERM, previous)


def _open_streams() -> None:
    """Put /dev/null in the place of standard streams that are closed, before another file gets their numbers.

    Raises MetaDiffError when results would have no place to go.
    """
    no_results = sys.stdout is None
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    for name in ("stdout", "stderr"):  # stdin stays None, by which its reader knows that it is closed
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 -- open to the end
    if no_results:
        raise MetaDiffError("standard output is closed, so results have no place to go", hint="add > FILE")


def _left(error: BaseException) -> int:
    """The exit code when the reader of the output has gone, `head` for one, which is no failure.

    Rich and Typer turn that into an exit of their own.
    """
    if isinstance(error, SystemExit) and not isinstance(error.__context__, BrokenPipeError):
        raise error
    with contextlib.suppress(OSError, ValueError):  # what is left in the buffer goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _told(error: BaseException, arguments: Sequence[str]) -> int:
    """Show an error as a message with a hint; returns the exit code. METADIFF_DEBUG=1 also shows where it came from."""
    if isinstance(error, Told):
        return error.exit_code
    show = getattr(error, "show", None)
    if callable(show):  # Typer's usage errors show themselves
        show()
        return exit_code(error)
    if os.environ.get("METADIFF_DEBUG") == "1" and isinstance(error, Exception):
        traceback.print_exception(error)
    Screen().error(*_message(error, arguments))
    return 130 if isinstance(error, typer.Abort) else exit_code(error)


def _message(error: BaseException, arguments: Sequence[str]) -> tuple[str, str | None]:
    """What went wrong, and what to type or change next."""
    if isinstance(error, ProcessLost):
        return error.message, _again(arguments) if error.resumable else "run it again"
    if isinstance(error, MetaDiffError):
        return error.message, error.hint
    if isinstance(error, Stopped):
        text = "terminated" if error.exit_code == 128 + signal.SIGTERM else "interrupted"
        return text, _again(arguments) if error.resumable else None
    if isinstance(error, typer.Abort | KeyboardInterrupt):
        return "interrupted", None
    if isinstance(error, OSError) and error.strerror:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}", "make room, and run it again" if full else None
    kind = type(error).__name__
    if kind in ("OutOfMemoryError", "MemoryError"):  # torch's or Python's
        return f"out of memory ({error})" if str(error) else "out of memory", SMALLER
    text = f"{kind}: {error}" if str(error) else kind
    return text, "run it again with METADIFF_DEBUG=1 to see where it failed"


def _again(arguments: Sequence[str]) -> str:
    """The command line that resumes what this one began."""
    given = [a for a in arguments if a not in ("--overwrite", "--resume")]
    return f"{_launcher()} {shlex.join(given)} --resume"


def _launcher() -> str:
    """How this process was started: the part of a command line before the command."""
    size, local = _world_size(), os.environ.get("LOCAL_WORLD_SIZE", "")
    if size == 1:
        return "metadiff"
    processes = int(local) if local.isdecimal() and int(local) else size
    several = f" --nnodes {size // processes} ..." if size > processes else ""
    return f"torchrun{several} --nproc-per-node {processes} -m metadiff_cli"


def _on_sigterm(number: int, frame: FrameType | None) -> None:
    raise Stopped(number)
