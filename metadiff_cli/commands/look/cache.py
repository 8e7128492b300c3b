"""`metadiff cache`: what is kept because it is slow to make, and how to remove it."""

import re
import stat
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metadiff_cli.console import Screen
from metadiff_cli.errors import ConfigError, MetaDiffError
from metadiff_cli.files import cache_dir

KINDS = {
    "images": "decoded images, made again from their files",
    "features": "features of images, made again by the encoder",
    "encoders": "encoders that `metatrain` reuses; training one again can take hours",
    "graphs": "graphs of encoders for onnxruntime, made again in half a minute",
}
HASH = "[0-9a-f]{32}"
# the names of our files; whatever has another name is not ours to delete, even if it begins with a hash
OURS = {
    "images": rf"{HASH}\.(npy|json)|s[0-9a-f]{{31}}\.(json|lock)",
    "features": rf"{HASH}-{HASH}\.(npy|parts)",
    "encoders": rf"{HASH}\.safetensors",
    "graphs": rf"{HASH}-\d+\.onnx",
}
PARTS = re.compile(r"\d{6}\.npy|\.\d{6}\.npy\.\w+\.tmp")  # in a folder of features that are not complete yet


@dataclass(frozen=True)
class Entry:
    """Something in the cache: a file, or a folder with the files of it that are ours; `size` in bytes."""

    path: Path
    size: int
    files: tuple[Path, ...]
    modified: float


def show(screen: Screen, *, as_json: bool) -> None:
    """Print number, size and age of the files of each kind."""
    root = cache_dir()
    rows: list[dict[str, Any]] = []
    for kind, what in KINDS.items():
        found = list(entries(root, kind))
        newest = max((e.modified for e in found), default=None)
        rows.append({
            "kind": kind, "what": what, "files": sum(len(e.files) for e in found), "bytes": sum(e.size for e in found),
            "newest": None if newest is None else time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(newest)),
        })  # fmt: skip
    if as_json:
        screen.json({"schema": "metadiff.cache/1", "folder": str(root), "kinds": rows})
        return
    cells = [
        (r["kind"], r["what"], str(r["files"]), in_units(r["bytes"]), (r["newest"] or "")[:16].replace("T", " "))
        for r in rows
    ]
    screen.table(f"Cache in {root}", ("kind", "what", "files", "size", "newest"), cells, left=2)
    screen.note("`metadiff cache clear [KIND ...]` removes it; METADIFF_CACHE_DIR moves it")


def clear(kinds: Sequence[str], screen: Screen, *, yes: bool) -> None:
    """Remove the entries of these kinds, of all kinds if none is named; asks unless `yes`.

    Raises ConfigError for an unknown kind and for a no, and MetaDiffError when files could not be removed.
    """
    root = cache_dir()
    for kind in kinds:
        if kind not in KINDS:
            raise ConfigError(f"unknown kind '{kind}'", hint=f"choose from {', '.join(KINDS)}")
    chosen = list(dict.fromkeys(kinds or KINDS))
    found = [entry for kind in chosen for entry in entries(root, kind)]
    if not found:
        screen.note(f"nothing of {', '.join(chosen)} in {root}")
        return
    total = in_units(sum(entry.size for entry in found))
    if not yes and not _agreed(f"Remove {total} of {', '.join(chosen)} from {root}?", screen):
        raise ConfigError("nothing was removed", hint="answer y, or give --yes")
    failed = [entry for entry in found if not _remove(entry)]
    screen.note(f"removed {in_units(sum(e.size for e in found if e not in failed))} from {root}")
    if failed:
        raise MetaDiffError(f"{len(failed)} files could not be removed, such as {failed[0].path}",
                            hint="check the permissions of the cache folder")  # fmt: skip


def entries(root: Path, kind: str) -> Iterator[Entry]:
    """Our files and folders directly in the folder of a kind. A folder that is a link leads elsewhere: it is empty."""
    folder = root / kind
    if folder.is_symlink() or not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        if _is_ours(path.name, kind):
            with suppress(FileNotFoundError):  # another process works there
                entry = _entry(path)
                if entry.files:
                    yield entry


def in_units(size: float) -> str:
    """Bytes with a unit, such as 1.5 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def _is_ours(name: str, kind: str) -> bool:
    """Whether a file of this name is ours: by its own name, as a lock, or as a temporary file."""
    written = rf"({OURS[kind]})"
    return re.fullmatch(rf"{written}(\.lock)?|\.{written}\.\w+\.tmp|\.tmp\w{{6}}", name) is not None


def _entry(path: Path) -> Entry:
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode):
        return Entry(path, status.st_size, (path,), status.st_mtime)
    parts = tuple(part for part in sorted(path.iterdir()) if PARTS.fullmatch(part.name))
    return Entry(path, sum(part.lstat().st_size for part in parts), parts, status.st_mtime)


def _remove(entry: Entry) -> bool:
    """Remove our files of an entry, and return whether they are gone. A link is removed, never its target."""
    try:
        for file in entry.files:
            file.unlink(missing_ok=True)
    except OSError:
        return False
    if entry.path.is_dir() and not entry.path.is_symlink():
        with suppress(OSError):  # files of somebody else are left in the folder
            entry.path.rmdir()
    return True


def _agreed(question: str, screen: Screen) -> bool:
    """Whether the person answers yes; no answer counts as a no."""
    screen.ask(f"{question} [y/N]")
    answer = sys.stdin.readline() if sys.stdin else ""  # None if the shell closed it
    if not answer.endswith("\n"):  # nobody pressed Enter
        screen.note("")
    return answer.strip().lower() in ("y", "yes")
