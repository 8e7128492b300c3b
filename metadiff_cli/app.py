"""The Typer app: registers the commands, and the one boundary that turns errors into messages and exit codes."""

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
from metadiff_cli.commands.train import metatrain, pretrain, refit
from metadiff_cli.console import Screen
from metadiff_cli.core.training.world import ALONE, announced, enter, world
from metadiff_cli.errors import ConfigError, MetaDiffError, ProcessLost, Stopped
from metadiff_cli.files import without_home

SEVERAL = ("pretrain", "metatrain", "evaluate")  # commands that several processes can share

USE, TRAIN, LOOK = "Use", "Train and measure", "Look around"

app = Commands(
    name="metadiff",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.command("adapt", rich_help_panel=USE)(adapt.adapt)
app.command("pretrain", rich_help_panel=TRAIN)(pretrain.pretrain)
app.command("metatrain", rich_help_panel=TRAIN)(metatrain.metatrain)
app.command("evaluate", rich_help_panel=TRAIN)(evaluate.evaluate)
app.command("export", rich_help_panel=USE)(look.export)
app.command("refit", rich_help_panel=TRAIN)(refit.refit)
app.command("inspect", rich_help_panel=LOOK)(look.inspect)
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
    _join(context.invoked_subcommand)


def _join(command: str | None) -> None:
    """Where torchrun began several processes, let them find one another."""
    found = announced(os.environ)
    if found.size == 1:
        return
    enter(found)
    if command not in SEVERAL:
        raise ConfigError(f"{command} is the work of one process", hint=f"type `metadiff {command}`, without torchrun")
    from metadiff_cli.core.training.distributed import start

    start(found)


def _leave() -> None:
    if world().size > 1:
        from metadiff_cli.core.training.distributed import stop

        stop()


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit code (see README for the meanings)."""
    previous = signal.signal(signal.SIGTERM, _on_sigterm)
    try:
        result = app(args=None if arguments is None else list(arguments), prog_name="metadiff", standalone_mode=False)
        _leave()
        return result if isinstance(result, int) else 0
    except ProcessLost as error:
        _trace()
        _tell(error.message, _again(arguments) if error.resumable else "run it again")
        return error.exit_code
    except MetaDiffError as error:
        _trace()
        _tell(error.message, error.hint)
        return error.exit_code
    except (typer.Abort, KeyboardInterrupt):
        _tell("interrupted", None)
        return 130
    except Stopped as stopped:
        again = _again(arguments) if stopped.resumable else None
        _tell("terminated" if stopped.exit_code == 143 else "interrupted", again)
        return stopped.exit_code
    except BrokenPipeError:  # the reader, `head` for one, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        return _unforeseen(error)
    finally:
        enter(ALONE)
        signal.signal(signal.SIGTERM, previous)


def _tell(message: str, hint: str | None) -> None:
    """An error, once: of several processes that meet it, the first one tells."""
    if world().size > 1:
        from metadiff_cli.core.training.distributed import speaks

        if not speaks():
            return
    Screen().error(message, hint)


def _again(arguments: Sequence[str] | None) -> str:
    """The command line that goes on with what this one began."""
    given = [a for a in arguments or sys.argv[1:] if a not in ("--overwrite", "--resume")]
    return f"{world().launcher} {shlex.join(given)} --resume"


def _unforeseen(error: Exception) -> int:
    """Usage errors of Typer show themselves; of anything else one line is shown, the rest with METADIFF_DEBUG=1."""
    show, code = getattr(error, "show", None), getattr(error, "exit_code", 1)
    if callable(show):
        show()
        return int(code)
    _trace()
    if isinstance(error, OSError) and error.strerror:
        _tell(*_of_the_system(error))
        return 1
    if world().size > 1:
        from metadiff_cli.core.training.distributed import lost, process_lost

        if lost(error):
            _tell(process_lost(error, resumable=False).message, "run it again")
            return 1
    kind = type(error).__name__
    _tell(f"{kind}: {error}" if str(error) else kind, "run it again with METADIFF_DEBUG=1 to see where it failed")
    return 1


def _of_the_system(error: OSError) -> tuple[str, str | None]:
    """Message and hint of what the system refused, as to write to a full disk."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror}", "make room, and run it again" if full else None


def _trace() -> None:
    if os.environ.get("METADIFF_DEBUG") == "1":
        traceback.print_exc()


def _on_sigterm(number: int, frame: FrameType | None) -> None:
    raise Stopped(number)
