"""Find query images in folders, files, globs, listings and standard input, with the paths that the output shows."""

import fnmatch
import functools
import glob
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from metadiff_cli.data.images import looks_like_image
from metadiff_cli.data.listing import as_utf8, is_listing, read_listing
from metadiff_cli.data.scan import Scan, class_name, is_image, suggestion, walk_images
from metadiff_cli.errors import DataError

LISTS = frozenset({".txt", ".lst", ".list"})  # extensions of files that hold paths, and no image


@dataclass(frozen=True)
class Query:
    """A query image: its path as given (joined with the path inside a folder), and its class where it is known."""

    path: str
    label: str | None = None


@dataclass(frozen=True)
class Queries:
    """The query images in the order of the output.

    A path that does not exist is in its place, and becomes an error when it is read. `unreadable` lists folders that
    cannot be read, with the reason. `skipped` counts the files that are not images, by extension.
    """

    items: tuple[Query, ...]
    unreadable: tuple[tuple[str, str], ...] = ()
    skipped: Mapping[str, int] = field(default_factory=dict)

    def paths(self) -> list[str]:
        """The path of each image."""
        return [query.path for query in self.items]

    def outside(self, root: Path, folders: Sequence[str], given: Sequence[str]) -> "Queries":
        """The queries without the images that an earlier run sorted below `root`, into one of `folders`.

        Everything below `root` is left out, because people rename the folders of sorted images, unless a path in
        `given` lies there itself. Raises DataError when nothing is left.
        """
        real = os.path.realpath(root)
        below = os.path.join(real, "")
        queried = any(f"{os.path.realpath(path)}{os.sep}".startswith(below) for path in given)
        places = tuple(os.path.join(real, folder, "") for folder in folders) if queried else (below,)
        folder_of = functools.cache(os.path.realpath)
        left = tuple(
            query
            for query in self.items
            if not os.path.join(folder_of(os.path.dirname(query.path)), "").startswith(places)
        )
        if self.items and not left:
            raise DataError(
                f"all {len(self.items)} query images are left out: they lie where --sort-into {root} sorts to",
                hint="give another --query, or another --sort-into",
            )
        return replace(self, items=left)


def find_queries(
    given: Sequence[str], *, null: bool = False, more: Sequence[str] = (), option: str = "--query"
) -> Queries:
    """Expand folders (nested ones too, sorted), globs, listings, and `-` for paths on stdin.

    Paths on stdin end with a line break, or with NUL where `null` is set or where there is one. `more` are files that
    the shell made of a pattern. The label of an image is the name of the first folder below the folder that was given,
    or that of the listing. Raises DataError, which names `option`, when there is no image, and when no path exists.
    """
    scan = Scan()
    named = given if not more else ()  # of a pattern that the shell expanded, other files are left out
    texts = [path for text in (*given, *more) for path in _expand(text, null, scan)]
    found = [query for text in texts for query in _queries(text, scan, named=text in named)]
    unique = {Path(query.path): query for query in reversed(found)}  # the first mention of an image stays
    items = tuple(query for query in found if unique[Path(query.path)] is query)
    if not items and not scan.unreadable:
        raise DataError(
            f"{option} {' '.join(given)}: there are no images",
            hint=f"give {option} a folder, files, a glob, a CSV file with a column 'path', or - for paths on stdin",
        )
    if items and "-" not in given and not any(_exists(query.path) for query in items):
        raise _missing(items, option)
    return Queries(items, tuple((str(path), reason) for path, reason in scan.unreadable), scan.skipped)


def _missing(items: Sequence[Query], option: str) -> DataError:
    """The error for query paths that do not exist."""
    first = items[0].path
    if len(items) > 1:
        return DataError(
            f"none of the {len(items)} images of {option} exists; the first is {first}", hint="check the paths"
        )
    if glob.has_magic(first):
        return DataError(f"{option} {first} matches no file", hint="check the pattern")
    return DataError(f"{option} {first} does not exist", hint=f"{suggestion(Path(first))}check the path")


def _exists(path: str) -> bool:
    """Whether there is something at a path, perhaps something that cannot be looked at."""
    try:
        os.lstat(path)
    except FileNotFoundError:
        return False
    except (OSError, ValueError):
        return True
    return True


def _queries(text: str, scan: Scan, *, named: bool) -> Iterator[Query]:
    """The images of one path. A file that a person `named` is tried as an image whatever its extension."""
    path = Path(text)
    if os.path.isdir(text):
        for image in walk_images(path, scan):
            inside = image.relative_to(path)
            label = class_name(inside.parts[0]) if len(inside.parts) > 1 else None
            yield Query(os.path.join(text, inside), label)
    elif is_listing(text):
        yield from (Query(row.path, row.label) for row in read_listing(text))
    elif named and path.suffix.lower() in LISTS and os.path.isfile(text):
        raise DataError(f"{text} is not an image", hint=f"for a list of paths, give --query - < {text}")
    elif not os.path.exists(text) or (os.path.isfile(text) and (named or _may_be_image(path))):
        yield Query(text)
    else:
        scan.skipped[path.suffix.lower()] += 1


def _may_be_image(path: Path) -> bool:
    """Whether a walk through a folder would take a file: by its extension, or without one by its content."""
    return is_image(path) or (not path.suffix and looks_like_image(path))


def _expand(text: str, null: bool, scan: Scan) -> list[str]:
    """The path itself where it exists, else what it matches as a glob, else itself, to be reported as missing."""
    if text == "-":
        return _stdin_paths(null)
    if os.path.lexists(text) or not glob.has_magic(text):
        return [text]
    return sorted(_glob(text, scan)) or [text]


def _glob(pattern: str, scan: Scan) -> set[str]:
    """What a pattern matches. A folder whose name has brackets is meant as it is, where there is one."""
    base, parts = "", pattern.split(os.sep)
    while os.path.lexists(os.path.join(base, parts[0]) or os.sep):
        base = os.path.join(base, parts.pop(0)) or os.sep
    if "**" not in parts:
        return set(glob.glob(os.path.join(glob.escape(base), *parts)))
    first = parts.index("**")
    roots = glob.glob(os.path.join(glob.escape(base), *parts[:first], "")) if first else [base or os.curdir]
    return {path for root in roots for path in _below(root, base, parts[first:], scan)}


def _below(root: str, base: str, pattern: Sequence[str], scan: Scan) -> Iterator[str]:
    """Images below a folder whose path inside of it fits a pattern with `**`, which is any number of folders.

    The walk goes round no loop of links, unlike `glob`.
    """
    for image in walk_images(Path(root), Scan(unreadable=scan.unreadable)):
        parts = image.relative_to(root).parts
        if any(_fits(parts[:end], pattern) for end in range(1, len(parts) + 1)):  # the image, or a folder of it
            yield os.path.join(root if root != os.curdir or base else "", *parts)


def _fits(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_fits(parts[start:], pattern[1:]) for start in range(len(parts) + 1))
    return bool(parts) and fnmatch.fnmatch(parts[0], pattern[0]) and _fits(parts[1:], pattern[1:])


def _stdin_paths(null: bool) -> list[str]:
    """Paths on stdin, read as bytes where possible, because a file name need not be valid text."""
    if sys.stdin is None:
        raise DataError("--query -: standard input is closed", hint="find photos -name '*.jpg' | metadiff adapt -Q -")
    raw = getattr(sys.stdin, "buffer", None)
    text = os.fsdecode(as_utf8(raw.read())) if raw is not None else sys.stdin.read()
    if "\0" in text:  # which no path has: it is what ends them
        return [path for path in text.split("\0") if path]
    lines = [line for line in (line.removesuffix("\r") for line in text.split("\n")) if line.strip()]
    if null and len(lines) > 1:
        raise DataError("-0 is given, and the paths on stdin end with line breaks", hint="leave out -0")
    return lines
