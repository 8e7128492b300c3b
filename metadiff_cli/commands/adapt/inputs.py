"""Query images from folders, files, globs, listings and standard input, each with the path that the output shows."""

import glob
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from metadiff_cli.data.listing import is_listing, read_listing
from metadiff_cli.data.scan import Scan, class_name, walk_images
from metadiff_cli.errors import DataError


@dataclass(frozen=True)
class Query:
    """One image: `path` is shown as it was given, joined with the relative path; `label` where it is known."""

    path: str
    label: str | None = None


@dataclass(frozen=True)
class Queries:
    """What is to be predicted, in the order of the output; `skipped` counts files that are no images.

    What does not exist stays in its place and is found missing when it is read; `unreadable` are folders.
    """

    items: tuple[Query, ...]
    unreadable: tuple[tuple[str, str], ...]
    skipped: int

    def paths(self) -> list[Path]:
        """As the file system takes them."""
        return [Path(item.path) for item in self.items]


def find_queries(given: Iterable[str], *, null: bool = False, outside: Path | None = None) -> Queries:
    """Expand folders (nested, sorted), globs, listings and `-` (a path a line on stdin, or NUL-separated with `null`).

    The label is the first folder's name below a folder that was given, or the listing's. Images below the folder
    `outside` are left out: an earlier run sorted them there. Raises DataError for nothing.
    """
    unreadable: list[tuple[Path, str]] = []
    scan = Scan(unreadable=unreadable)
    found = [item for text in given for path in _expand(text, null) for item in _items(path, scan)]
    unique = {Path(item.path): item for item in reversed(found)}  # of two mentions the first one stays
    items = tuple(item for item in found if unique[Path(item.path)] is item and not _below(item.path, outside))
    if not items and not unreadable:
        raise DataError(
            "no query images were found",
            hint="give --query a folder, files, a glob, a CSV file with a column 'path', or - for paths on stdin",
        )
    return Queries(items, tuple((str(path), reason) for path, reason in unreadable), scan.skipped.total())


def _below(path: str, folder: Path | None) -> bool:
    return folder is not None and Path(os.path.abspath(folder)) in Path(os.path.abspath(path)).parents


def _items(text: str, scan: Scan) -> Iterator[Query]:
    path = Path(text)
    if path.is_dir():
        for image in walk_images(path, scan):
            inside = image.relative_to(path)
            label = class_name(inside.parts[0]) if len(inside.parts) > 1 else None
            yield Query(os.path.join(text, inside), label)
    elif is_listing(path):
        yield from (Query(row.path, row.label) for row in read_listing(text))
    elif not path.exists() or path.is_file():  # a file that was named is tried whatever its extension
        yield Query(text)
    else:
        scan.skipped[path.suffix.lower()] += 1


def _expand(text: str, null: bool) -> list[str]:
    """The path itself where it exists, else what it matches as a glob, else itself (it will be reported missing)."""
    if text == "-":
        return _stdin_paths(null)
    if os.path.exists(text) or not glob.has_magic(text):
        return [text]
    loops: dict[str, bool] = {}
    found = [path for path in glob.glob(text, recursive=True) if not _loops(os.path.dirname(path), loops)]
    return sorted(found) or [text]


def _loops(folder: str, known: dict[str, bool]) -> bool:
    """Whether the way to a folder passes one folder twice, as ** does through a link that leads back up."""
    if folder not in known:
        plain = Path(os.path.normpath(folder))
        above = [plain, *plain.parents]
        known[folder] = len({os.path.realpath(place) for place in above}) < len(above)
    return known[folder]


def _stdin_paths(null: bool) -> list[str]:
    """Names of files need not be valid text, so bytes are read where there are any."""
    raw = getattr(sys.stdin, "buffer", None)
    text = os.fsdecode(raw.read()) if raw is not None else sys.stdin.read()
    if null:
        return [path for path in text.split("\0") if path]
    return [line for line in (line.removesuffix("\r") for line in text.split("\n")) if line.strip()]
