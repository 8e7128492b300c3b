"""Sort images into one folder per class. No file is overwritten: an image takes a free name, a copy is not repeated."""

import filecmp
import hashlib
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from metadiff_cli.files import copy_file

REJECTED = "_rejected"
LONGEST = 120  # bytes of a folder's name: most file systems allow 255, encrypted ones fewer
FORBIDDEN = re.compile(r'[\x00-\x1f\x7f/\\:*?"<>|]')  # in names, by some common file system or shell
RESERVED = frozenset({"con", "prn", "aux", "nul", *(f"{port}{i}" for port in ("com", "lpt") for i in range(1, 10))})


@dataclass(frozen=True)
class Placed:
    """The path of a sorted image. `new` is False when a file of the same content was there, and nothing was done."""

    path: Path
    new: bool


class Sorter:
    """Copies or moves images into the folder of their class below `root`. The class None is that of rejected images."""

    def __init__(self, root: Path, classes: Sequence[str], *, move: bool = False) -> None:
        self.root, self.move = root, move
        self.folders = folder_names(classes)
        # runs that sort into one folder at the same time take turns, or both would find a free name for one image
        user = os.getuid() if hasattr(os, "getuid") else 0
        name = hashlib.sha256(os.fsencode(os.path.realpath(root))).hexdigest()[:16]
        self.lock = FileLock(Path(tempfile.gettempdir()) / f"metadiff-sort-{user}-{name}.lock")

    def place(self, image: Path, label: str | None) -> Placed:
        """Copy or move one image into the folder of its class. Raises OSError."""
        folder = self.root / self.folders[label]
        folder.mkdir(parents=True, exist_ok=True)
        with self.lock.acquire(poll_interval=0.01):
            for target in _candidates(folder, image.name):
                if not os.path.lexists(target):
                    with suppress(FileExistsError):  # another user's run was faster: compare with what it put there
                        _bring(image, target, self.move)
                        return Placed(target, True)
                if target.is_file() and filecmp.cmp(image, target, shallow=False):
                    return Placed(target, False)
        raise AssertionError("names never run out")


def folder_names(classes: Sequence[str]) -> dict[str | None, str]:
    """A folder name for each class, valid on all common file systems, and unique where case does not count."""
    names: dict[str | None, str] = {}
    taken: set[str] = set()
    for cls in (None, *classes):
        plain = REJECTED if cls is None else _safe(cls)
        name, number = plain, 2
        while name.casefold() in taken:
            name, number = f"{plain} ({number})", number + 1
        taken.add(name.casefold())
        names[cls] = name
    return names


def _safe(cls: str) -> str:
    name = FORBIDDEN.sub("_", cls).encode(errors="surrogateescape")[:LONGEST].decode(errors="ignore")
    name = name.strip().rstrip(".")
    if not name or name.startswith(".") or name.partition(".")[0].lower() in RESERVED:
        name = f"_{name}"
    return name


def _candidates(folder: Path, name: str) -> Iterator[Path]:
    yield folder / name
    stem, suffix = os.path.splitext(name)
    number = 2
    while True:
        yield folder / f"{stem} ({number}){suffix}"
        number += 1


def _bring(image: Path, target: Path, move: bool) -> None:
    """Copy or move `image` to `target`, wholly or not at all. Raises FileExistsError when `target` exists."""
    if not (move and _linked(image, target)):
        copy_file(image, target, new=True)
    if move:
        try:
            image.unlink(missing_ok=True)
        except OSError:
            target.unlink()
            raise


def _linked(image: Path, target: Path) -> bool:
    """Give the image a second name, and say whether that was possible: some file systems have no hard links.

    A symbolic link gets none, because the link would then point to nowhere.
    """
    if image.is_symlink():
        return False
    try:
        os.link(image, target)
    except FileExistsError:
        raise
    except OSError:
        return False
    return True
