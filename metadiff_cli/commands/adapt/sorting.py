"""`adapt --sort-into`: query images into the folders of their classes, and what is said of that in the end."""

import errno
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from metadiff_cli.commands.adapt.output import Outcome
from metadiff_cli.console import Screen, counted
from metadiff_cli.data.sort import Sorter
from metadiff_cli.errors import MetaDiffError

FULL = (errno.ENOSPC, errno.EDQUOT)


class Sorting:
    """Sorts one image after the other, and counts them. An image of the support is never moved."""

    def __init__(self, sorter: Sorter, support: Iterable[str]) -> None:
        """`support` are the paths of the support images."""
        self.sorter = sorter
        self.support = {_identity(path) for path in support} - {None}
        self.new = self.before = self.kept = self.failed = 0
        self.full = False

    def sort(self, outcome: Outcome) -> Outcome:
        """Sort the image, and say where it is now. Raises OSError where that fails."""
        if self.sorter.move and _identity(outcome.path) in self.support:
            self.kept += 1
            return outcome
        try:
            placed = self.sorter.place(Path(outcome.path), outcome.label)
        except OSError as error:
            self.failed += 1
            self.full |= error.errno in FULL
            raise
        self.new += placed.new
        self.before += not placed.new
        return replace(outcome, sorted_to=str(placed.path))

    def tell(self, screen: Screen) -> None:
        """Say how many images were sorted, and which were not."""
        done = "moved" if self.sorter.move else "copied"
        screen.note(f"{counted(self.new, 'image')} {done} into {self.sorter.root}")
        if self.before:
            screen.note(f"left in place, because a copy was there already: {counted(self.before, 'image')}")
        if self.kept:
            screen.warn(f"left in place, because they are support images: {counted(self.kept, 'image')}")

    def check(self) -> None:
        """Raise MetaDiffError when the disk is full, and when no image could be sorted."""
        if self.full:
            raise MetaDiffError(
                f"{counted(self.failed, 'image')} could not be sorted: the disk of {self.sorter.root} is full",
                hint="make room, and run it again: images that are there already stay",
            )
        if self.failed and not self.new + self.before:
            raise MetaDiffError(
                f"no image could be sorted into {self.sorter.root}", hint="see the reasons above; give another folder"
            )


def _identity(path: str) -> tuple[int, int] | None:
    """What two names of one file have in common; None for a file that is not there."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino
