"""A walk through folders of images: which files are images, and what is left out.

No pixels are read here. What cannot be accessed is an entry with a reason, never the end of a walk.
"""

import difflib
import errno
import os
import stat
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from metadiff_cli.data.images import IMAGE_SUFFIXES, looks_like_image
from metadiff_cli.errors import DataError

IGNORED = frozenset({"__MACOSX", "Thumbs.db", "desktop.ini"})
ARCHIVES = frozenset({".zip", ".tar", ".gz", ".tgz", ".7z", ".rar", ".bz2", ".xz"})
MAX_DEPTH, MAX_WAYS = 64, 64  # levels of folders, and ways by which links lead to one of them

Progress = Callable[[int, int | None], None]


def no_progress(done: int, total: int | None) -> None:
    """Report nothing."""


@dataclass
class Scan:
    """The options and the findings of one walk through folders.

    `keep_empty` allows classes without images; `progress` is told the number of images found so far after every class.
    The findings: `skipped` counts files that are not images, by extension in lower case; `unreadable` has path and
    reason of what cannot be accessed; `notes` are for the user.
    """

    keep_empty: bool = False
    progress: Progress = field(default=no_progress, repr=False)
    skipped: Counter[str] = field(default_factory=Counter)
    unreadable: list[tuple[Path, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    found: int = 0

    def add(self, images: int) -> None:
        """Count `images` further images, and report the progress."""
        self.found += images
        self.progress(self.found, None)


def walk_images(folder: Path, scan: Scan) -> Iterator[Path]:
    """The images below a folder, in sorted order. Links are followed, but not into a folder that contains them.

    A file of another kind is counted, and a folder that cannot be listed is collected. Raises DataError for more than
    MAX_DEPTH levels, and for a folder that links reach in more than MAX_WAYS ways.
    """
    yield from _walk(folder, scan, (), Counter())


def subfolders(root: Path, scan: Scan | None = None) -> list[Path]:
    """The visible folders directly below `root`, sorted by name. Raises DataError if it cannot be listed."""
    try:
        entries = _entries(root)
    except (OSError, ValueError) as error:
        raise DataError(f"{root} cannot be read ({reason_of(error)})", hint="check its permissions") from error
    return [path for path in entries if _kind(path, scan if scan is not None else Scan()) == "folder"]


def check_folder(root: Path, hint: str = "give a folder that holds one folder of images per class") -> None:
    """Raise DataError unless `root` is a folder; `hint` says what to give instead."""
    try:
        is_folder = stat.S_ISDIR(root.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"folder {root} does not exist", hint=f"{suggestion(root)}{hint}") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{root} cannot be read ({reason_of(error)})", hint="check its permissions") from error
    if not is_folder:
        packed = root.suffix.lower() in ARCHIVES
        raise DataError(
            f"{root} is {'an archive' if packed else 'a file'}, not a folder",
            hint="unpack it, and give the folder" if packed else hint,
        )


def suggestion(path: Path) -> str:
    """The question "did you mean ...?" for what lies beside `path` under a similar name, or an empty text."""
    with suppress(OSError):
        close = difflib.get_close_matches(path.name, [other.name for other in path.parent.iterdir()], n=1)
        if close:
            return f"did you mean {path.parent / close[0]}? "
    return ""


def is_image(path: Path) -> bool:
    """Whether the extension of the file is that of an image."""
    return path.suffix.lower() in IMAGE_SUFFIXES


def class_name(text: str) -> str:
    r"""The name of a class in one valid spelling.

    macOS writes accents as separate characters, other systems do not: both become NFC. Bytes that are no UTF-8 become
    text such as \xe9, so that names that differ stay different.
    """
    return unicodedata.normalize("NFC", os.fsencode(text).decode("utf-8", "backslashreplace"))


def left_out(skipped: Mapping[str, int]) -> str:
    """A line on the files that are not images, by extension; an empty text if there are none."""
    if not skipped:
        return ""
    kinds = ", ".join(f"{count} {suffix or 'without extension'}" for suffix, count in Counter(skipped).most_common())
    return f"left out, as they are not images: {kinds}"


def reason_of(error: BaseException) -> str:
    """Why the system refused something, in a few words."""
    return (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__


def _walk(
    folder: Path, scan: Scan, above: tuple[tuple[int, int], ...], ways: Counter[tuple[int, int]]
) -> Iterator[Path]:
    try:
        status, entries = folder.stat(), _entries(folder)
    except (OSError, ValueError) as error:
        scan.unreadable.append((folder, reason_of(error)))
        return
    identity = (status.st_dev, status.st_ino)
    if identity in above:
        return  # a symbolic link that leads back up
    _check_walk(folder, len(above), ways, identity)
    for path in entries:
        kind = _kind(path, scan)
        if kind == "folder":
            yield from _walk(path, scan, (*above, identity), ways)
        elif kind == "file" and (is_image(path) or (not path.suffix and looks_like_image(path))):
            yield path
        elif kind is not None:
            scan.skipped[path.suffix.lower()] += 1


def _check_walk(folder: Path, depth: int, ways: Counter[tuple[int, int]], identity: tuple[int, int]) -> None:
    """Raise DataError for endless walks: links between a few dozen folders multiply the ways through them."""
    ways[identity] += 1
    if ways[identity] > MAX_WAYS:
        raise DataError(f"{folder} is reached in more than {MAX_WAYS} ways", hint="remove the links that lead there")
    if depth >= MAX_DEPTH:
        raise DataError(f"{folder} is more than {MAX_DEPTH} folders deep", hint="move the images further up")


def _kind(path: Path, scan: Scan) -> Literal["folder", "file", "special"] | None:
    """What a path is; `special` are pipes, sockets and devices, whose reading could wait for ever.

    A dangling link counts as a file, and so does what cannot be accessed but has the name of an image: both are found
    broken when they are read. Anything else that cannot be accessed is collected, and is None.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        if is_image(path) or (isinstance(error, OSError) and error.errno in (errno.ENOENT, errno.ELOOP)):
            return "file"
        scan.unreadable.append((path, reason_of(error)))
        return None
    return "folder" if stat.S_ISDIR(mode) else "file" if stat.S_ISREG(mode) else "special"


def _entries(folder: Path) -> list[Path]:
    """The visible files and folders directly in a folder, sorted by name."""
    return sorted((p for p in folder.iterdir() if not _ignored(p.name)), key=lambda p: p.name)


def _ignored(name: str) -> bool:
    return name.startswith(".") or name in IGNORED
