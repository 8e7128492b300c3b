"""Paths on the command line: an empty path is refused, and a place that cannot be written is found before the work."""

import errno
import os
import tempfile
from pathlib import Path

import typer

from metadiff_cli.errors import ConfigError


def path_option(text: str) -> Path:
    """Parse the path of an option; `~` is the home folder.

    Raises typer.BadParameter, which names the option and has exit code 2, for an empty path. A variable that is not
    set leaves one, and it would be the working folder.
    """
    return Path(path_text(text))


def path_text(text: str) -> str:
    """As `path_option`, for a path that is kept as text because the output shows it as it was given."""
    if not text:
        raise typer.BadParameter("the path is empty. Write . for the working folder.")
    return os.path.expanduser(text)


def check_writable(folder: Path, option: str) -> None:
    """Raise ConfigError when no file can be made in `folder`, or where it would be made if it does not exist yet.

    `option` is what the message names, as "--report page.html". A full disk is an OSError.
    """
    place = folder.absolute()
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    if not os.path.isdir(place):
        raise ConfigError(f"{option} cannot be written: {place} is not a folder", hint="give another place")
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ConfigError(
            f"{option} cannot be written: {place}: {error.strerror}", hint="give another place, or change the rights"
        ) from error
