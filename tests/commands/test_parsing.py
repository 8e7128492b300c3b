"""All options of all commands: one value once, and no empty path."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import typer

from metadiff_cli.app import app
from tests.worlds import Result

CLI = Callable[..., Result]


def commands(command: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The words of every command, and the command."""
    inner = getattr(command, "commands", None)
    if inner is None:
        yield words, command
    for name, subcommand in (inner or {}).items():
        yield from commands(subcommand, (*words, name))


def takes_path(command: Any, name: str) -> bool:
    """Whether a parameter is a path, or a list of paths."""
    hint = get_type_hints(command.callback)[name]
    return Path in (hint, *get_args(hint), *(inner for part in get_args(hint) for inner in get_args(part)))


COMMANDS = list(commands(typer.main.get_command(app)))
PARAMETERS = [(words, command, p) for words, command in COMMANDS for p in command.params if p.name != "help"]
NOT_YET = {("refit",)}  # their own options do not use the common parser of paths
PATHS = [
    (words, command, p) for words, command, p in PARAMETERS if takes_path(command, p.name) and words not in NOT_YET
]
SINGLE = [
    (words, command, p)
    for words, command, p in PARAMETERS
    if p.param_type_name == "option" and not (p.multiple or p.is_flag)
]


def name_of(value: Any) -> str:
    return " ".join(value) if isinstance(value, tuple) else getattr(value, "name", "")


def called_with(words: tuple[str, ...], command: Any, given: Any, *values: str) -> list[str]:
    """The words of a command line with these values for one parameter, and "x" for all others that are required."""
    line = list(words)
    for p in command.params:
        if p is given:
            line += [
                word
                for value in values
                for word in ([value] if p.param_type_name == "argument" else [p.opts[0], value])
            ]
        elif p.required:
            line += ["x"] if p.param_type_name == "argument" else [p.opts[0], "x"]
    return line


@pytest.mark.parametrize(("words", "command", "given"), PATHS, ids=name_of)
def test_an_empty_path_is_a_usage_error(cli: CLI, words: tuple[str, ...], command: Any, given: Any) -> None:
    result = cli(*called_with(words, command, given, ""))
    assert result.code == 2 and "the path is empty" in result.err and result.out == ""
    assert given.opts[0].upper() in result.err.upper()


@pytest.mark.parametrize(("words", "command", "given"), SINGLE, ids=name_of)
def test_two_values_of_one_option_are_refused(cli: CLI, words: tuple[str, ...], command: Any, given: Any) -> None:
    result = cli(*called_with(words, command, given, "1", "2"))
    assert result.code == 2 and f"{given.opts[0]} was given 2 times" in result.err and "try:" in result.err


def test_flags_and_lists_may_be_repeated(cli: CLI) -> None:
    shown = cli("config", "show", "--json", "--json", "--set", "seed=1", "--set", "encoder=resnet12")
    assert shown.code == 0 and '"seed": 1' in shown.out and "resnet12" in shown.out
