"""How the command line is read, for all commands: an option that takes one value may be given once."""

from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

import typer
from typer.core import TyperCommand, TyperOption

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


class Commands(typer.Typer):
    """A Typer app whose commands are of the class above."""

    def command(self, name: str | None = None, **settings: Any) -> Callable[[Function], Function]:
        """Register a command, see `typer.Typer.command`."""
        return super().command(name, cls=Command, **settings)
