"""The Typer app: registers the commands, and the one boundary that turns errors into messages and exit codes."""

import os
import signal
import sys
import traceback
from collections.abc import Sequence
from types import FrameType
from typing import Annotated

import typer

from metadiff_cli import __version__
from metadiff_cli.commands import (
    adapt,
    cache,
    config,
    data,
    doctor,
    evaluate,
    inspect,
    metatrain,
    presets,
    pretrain,
    refit,
)
from metadiff_cli.console import Screen
from metadiff_cli.errors import MetaDiffError

app = typer.Typer(
    name="metadiff",
    help="Learn to classify images from a handful of examples per class, by diffusion over classifier weights.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.command("pretrain")(pretrain.pretrain)
app.command("metatrain")(metatrain.metatrain)
app.command("adapt")(adapt.adapt)
app.command("evaluate")(evaluate.evaluate)
app.command("refit")(refit.refit)
app.command("inspect")(inspect.inspect)
app.command("doctor")(doctor.doctor)
app.add_typer(presets.app, name="presets")
app.add_typer(data.app, name="data")
app.add_typer(config.app, name="config")
app.add_typer(cache.app, name="cache")


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"metadiff {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Learn to classify images from a handful of examples per class, by diffusion over classifier weights."""


class Terminated(BaseException):
    """SIGTERM arrived; not an Exception, so that nothing on the way up swallows it."""


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit code (see README for the meanings)."""
    previous = signal.signal(signal.SIGTERM, _on_sigterm)
    try:
        result = app(args=None if arguments is None else list(arguments), standalone_mode=False)
        return result if isinstance(result, int) else 0
    except MetaDiffError as error:
        _trace()
        Screen().error(error.message, error.hint)
        return error.exit_code
    except (typer.Abort, KeyboardInterrupt):
        Screen().error("interrupted", None)
        return 130
    except Terminated:
        Screen().error("terminated", None)
        return 143
    except BrokenPipeError:  # the reader, `head` for one, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        return _unforeseen(error)
    finally:
        signal.signal(signal.SIGTERM, previous)


def _unforeseen(error: Exception) -> int:
    """Usage errors of Typer show themselves; of anything else one line is shown, the rest with METADIFF_DEBUG=1."""
    show, code = getattr(error, "show", None), getattr(error, "exit_code", 1)
    if callable(show):
        show()
        return int(code)
    _trace()
    kind = type(error).__name__
    Screen().error(
        f"{kind}: {error}" if str(error) else kind, "run it again with METADIFF_DEBUG=1 to see where it failed"
    )
    return 1


def _trace() -> None:
    if os.environ.get("METADIFF_DEBUG") == "1":
        traceback.print_exc()


def _on_sigterm(number: int, frame: FrameType | None) -> None:
    raise Terminated
