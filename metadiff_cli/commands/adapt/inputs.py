"""Find query images in folders, files, globs, listings and standard input, with the paths that the output shows."""

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
    """A query image: its path as given (joined with the path inside a folder), and its class where it is known."""

    path: str
    label: str | None = None


@dataclass(frozen=True)
class Queries:
    """The query images in the order of the output.

    A path that does not exist is in its place, and becomes an error when it is read. `unreadable` lists folders that
    cannot be read, with the reason. `skipped` is the number of files that are no images.
    """

    items: tuple[Query, ...]
    unreadable: tuple[tuple[str, str], ...]
    skipped: int

    def paths(self) -> list[Path]:
        """The path of each image."""
        return [Path(item.path) for item in self.items]


def find_queries(given: Iterable[str], *, null: bool = False, outside: Path | None = None) -> Queries:
    """Expand folders (nested ones too, sorted), globs, listings, and `-` for paths on stdin.

    Paths on stdin end with a line break, or with NUL where `null` is set. The label of an image is the name of the
    first folder below the folder that was given, or that of the listing. Images below the folder `outside` are left
    out, because an earlier run sorted them there. Raises DataError when there is no image.
    """
    unreadable: list[tuple[Path, str]] = []
    scan = Scan(unreadable=unreadable)
    found = [item for text in given for path in _expand(text, null) for item in _items(path, scan)]
    unique = {Path(item.path): item for item in reversed(found)}  # the first mention of an image stays
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
    """The path itself where it exists, else what it matches as a glob, else itself, to be reported as missing."""
    if text == "-":
        return _stdin_paths(null)
    if os.path.exists(text) or not glob.has_magic(text):
        return [text]
    loops: dict[str, bool] = {}
    found = [path for path in glob.glob(text, recursive=True) if not _loops(os.path.dirname(path), loops)]
    return sorted(found) or [text]


def _loops(folder: str, known: dict[str, bool]) -> bool:
    """Whether the path to a folder passes a folder twice, as ** does through a link that leads back to a parent."""
    if folder not in known:
        plain = Path(os.path.normpath(folder))
        above = [plain, *plain.parents]
        known[folder] = len({os.path.realpath(place) for place in above}) < len(above)
    return known[folder]


def _stdin_paths(null: bool) -> list[str]:
    """Paths on stdin, read as bytes where possible, because a file name need not be valid text."""
    raw = getattr(sys.stdin, "buffer", None)
    text = os.fsdecode(raw.read()) if raw is not None else sys.stdin.read()
    if null:
        return [path for path in text.split("\0") if path]
    return [line for line in (line.removesuffix("\r") for line in text.split("\n")) if line.strip()]
