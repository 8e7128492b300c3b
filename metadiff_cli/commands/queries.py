"""Query images from folders, files, globs and standard input, with the path that the output shows."""

import glob
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from metadiff_cli.data.folders import Scan, is_image, walk_images
from metadiff_cli.errors import DataError


@dataclass(frozen=True)
class Queries:
    """`paths` are the images in the order of the output; `missing` what was asked for and is not there."""

    paths: list[Path]
    missing: list[Path]
    skipped: int


def find_queries(given: Iterable[str]) -> Queries:
    """Expand folders (nested, sorted), globs and `-` (one path a line on stdin). Raises DataError for nothing."""
    scan, paths, missing = Scan(), [], []
    for text in given:
        for path in _stdin_paths() if text == "-" else _expand(text):
            if path.is_dir():
                paths += list(walk_images(path, scan))
            elif not path.exists():
                missing.append(path)
            elif is_image(path):
                paths.append(path)
            else:
                scan.skipped += 1
    unique = list(dict.fromkeys(paths))
    if not unique and not missing:
        raise DataError(
            "no query images were found", hint="give --query a folder, files, a glob, or - for paths on stdin"
        )
    return Queries(unique, missing, scan.skipped)


def _expand(text: str) -> list[Path]:
    """The path itself where it exists, else what it matches as a glob, else itself (it will be reported missing)."""
    if Path(text).exists() or not glob.has_magic(text):
        return [Path(text)]
    return [Path(match) for match in sorted(glob.glob(text, recursive=True))] or [Path(text)]


def _stdin_paths() -> list[Path]:
    return [Path(line) for line in sys.stdin.read().splitlines() if line.strip()]
