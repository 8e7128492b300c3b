"""Paths on the command line. An empty one, as from an unset variable of a script, is a mistake and not a folder."""

from pathlib import Path

import typer


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
