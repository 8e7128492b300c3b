"""`metadiff demo`: the pictures that come with the package, copied to a folder, and `metadiff adapt` run on them."""

import filecmp
import os
import shlex
import webbrowser
from pathlib import Path

from metadiff_cli.commands.adapt.command import adapt
from metadiff_cli.commands.pages.page import check_page
from metadiff_cli.console import Screen, counted
from metadiff_cli.errors import ConfigError
from metadiff_cli.files import DEMO, copy_file


def run_demo(folder: Path, screen: Screen, *, browser: bool) -> None:
    """Copy the pictures, adapt to those of `imgs`, label those of `query`, write a report, and open it if asked to.

    Raises ConfigError for a folder that cannot be written to, or where another file has a name that is needed.
    """
    support, query, report = folder / "imgs", folder / "query", folder / "report.html"
    check_page(report)
    copied = copy_pictures(folder)
    done = f"copied {counted(copied, 'picture')} to {folder}" if copied else f"the pictures are in {folder} already"
    screen.note(f"{done}: imgs to learn from, query to label")
    command = ["metadiff", "adapt", "--support", str(support), "--query", str(query), "--report", str(report)]
    screen.note(f"$ {shlex.join(command)}")
    adapt(query=[str(query)], support=support, report=report, quiet=screen.quiet)
    screen.note(f"open {report}; then run that command on your own folders")
    if browser and not webbrowser.open(report.resolve().as_uri()):
        screen.warn(f"no browser was found; open {report} yourself")


def copy_pictures(folder: Path) -> int:
    """Copy the pictures to a folder; returns how many were not there yet. No file is replaced.

    Raises ConfigError, before anything is copied, where another file has the name of a picture.
    """
    pictures = {picture: folder / picture.relative_to(DEMO) for picture in sorted(DEMO.rglob("*.jpg"))}
    for picture, target in pictures.items():
        if os.path.lexists(target) and not (target.is_file() and filecmp.cmp(picture, target, shallow=False)):
            raise ConfigError(
                f"{target} is there already, and is another picture", hint="give another folder: --out DIR"
            )
    new = {picture: target for picture, target in pictures.items() if not target.exists()}
    for picture, target in new.items():
        copy_file(picture, target, new=True)
    return len(new)
