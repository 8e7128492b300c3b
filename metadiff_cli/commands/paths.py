"""Paths on the command line. An empty one, as from an unset variable of a script, is a mistake and not a folder."""

from pathlib import Path

import typer


def path_option(text: str) -> Path:
    """The parser of every option and argument that takes a path.

    Raises BadParameter (exit code 2) for an empty text, which Path would take for the working folder.
    """
    if not text:
        raise typer.BadParameter("the path is empty; give . for the working folder")
    return Path(text)
