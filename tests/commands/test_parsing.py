"""All options of all commands: one value once, and no empty path; paths as people write them."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import typer

from metadiff_cli.app import app
from metadiff_cli.commands.parsing import path_option, path_text
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
    *_, option = get_args(get_type_hints(command.callback, include_extras=True)[name])
    return getattr(option, "parser", None) in (path_option, path_text)


COMMANDS = list(commands(typer.main.get_command(app)))
PARAMETERS = [(words, command, p) for words, command in COMMANDS for p in command.params if p.name != "help"]
PATHS = [(words, command, p) for words, command, p in PARAMETERS if takes_path(command, p.name)]
SINGLE = [
    (words, command, p)
    for words, command, p in PARAMETERS
    if p.param_type_name == "option" and not (p.multiple or p.is_flag)
]


def name_of(value: Any) -> str:
    return " ".join(value) if isinstance(value, tuple) else getattr(value, "name", "")


def hints(hint: Any) -> set[Any]:
    """A type and those that it is made of."""
    return {hint}.union(*map(hints, get_args(hint)))


def test_every_path_is_parsed_as_one() -> None:
    paths = {(words, p.name) for words, _, p in PATHS}
    for words, command, p in PARAMETERS:
        assert (words, p.name) in paths or Path not in hints(get_type_hints(command.callback)[p.name])


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
    assert (given.metavar if given.param_type_name == "argument" else given.opts[0]) in result.err


@pytest.mark.parametrize(("words", "command", "given"), SINGLE, ids=name_of)
def test_two_values_of_one_option_are_refused(cli: CLI, words: tuple[str, ...], command: Any, given: Any) -> None:
    result = cli(*called_with(words, command, given, "1", "2"))
    assert result.code == 2 and f"{given.opts[0]} was given 2 times" in result.err and "try:" in result.err


def test_flags_and_lists_may_be_repeated(cli: CLI) -> None:
    shown = cli("config", "show", "--json", "--json", "--set", "seed=1", "--set", "encoder=resnet12")
    assert shown.code == 0 and '"seed": 1' in shown.out and "resnet12" in shown.out


def test_a_path_is_taken_as_it_is() -> None:
    for text in (".", "a b", "~backup", "a/~/b", "-"):
        assert path_option(text) == Path(text)


def test_the_home_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert path_option("~/x/y") == tmp_path / "x" / "y" and path_option("~") == tmp_path


def test_no_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", fail)
    with pytest.raises(typer.BadParameter, match="needs a home folder"):
        path_option("~/x")


def test_an_empty_path_is_refused() -> None:
    with pytest.raises(typer.BadParameter, match="the path is empty"):
        path_option("")
