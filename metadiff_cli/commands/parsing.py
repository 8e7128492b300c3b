"""How the command line is read, for all commands.

An option that takes one value may be given once. An empty path, as from an unset variable of a script, is a mistake and
not a folder.
"""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import typer
from typer.core import TyperCommand, TyperGroup, TyperOption

from metadiff_cli.commands.help import show_help
from metadiff_cli.errors import ConfigError

Function = TypeVar("Function", bound=Callable[..., Any])


class Command(TyperCommand):
    """A command that refuses to choose between two values of one option."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Raises ConfigError for a repeated option, unless it is a flag or collects values."""
        _, _, given = self.make_parser(ctx).parse_args(args=list(args))
        for param, times in Counter(given).items():
            if times > 1 and isinstance(param, TyperOption) and not (param.multiple or param.is_flag):
                raise ConfigError(f"{param.opts[0]} was given {times} times, and takes one value", hint="give it once")
        return super().parse_args(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the page of the command."""
        show_help(self, ctx)


class Group(TyperGroup):
    """A group of commands whose `--help` does not wait for pydantic."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Where a command follows, leave out --help and the options of shell completion, which are not given then.

        Typer loads pydantic to check them all the same, for a third of the time of a whole `--help`.
        """
        if args and args[0] in self.commands:
            self.add_help_option = False
            self.params = [param for param in self.params if "completion" not in (param.name or "")]
        return super().parse_args(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the page of the group."""
        show_help(self, ctx)


class Commands(typer.Typer):
    """A Typer app whose commands and groups are of the classes above."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(cls=Group, **settings)

    def command(self, name: str | None = None, **settings: Any) -> Callable[[Function], Function]:
        """Register a command, see `typer.Typer.command`."""
        return super().command(name, cls=Command, **settings)


def path_option(text: str) -> Path:
    """The parser of every option and argument that takes a path; `~/` is the home folder, as in a shell.

    Raises BadParameter (exit code 2) for an empty text, which Path would take for the working folder, and for `~/`
    when there is no home folder.
    """
    if not text:
        raise typer.BadParameter("the path is empty; give . for the working folder")
    if not (text == "~" or text.startswith("~/")):
        return Path(text)
    try:
        return Path(text).expanduser()
    except RuntimeError as error:  # no HOME, and a user without an entry in the list of users
        raise typer.BadParameter(f"{text} needs a home folder, and there is none") from error


def path_text(text: str) -> str:
    """The same for a path that stays as it was given, because the output shows it; `-` and patterns are none."""
    return str(path_option(text)) if text == "" or text.startswith("~") else text
