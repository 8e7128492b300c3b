"""`metadiff cache`: what is kept because it is slow to make, and how to be rid of it."""

import os
import re
import shutil
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from metadiff_cli.commands import completions, options
from metadiff_cli.console import Screen
from metadiff_cli.errors import ConfigError, MetaDiffError
from metadiff_cli.files import cache_dir

app = typer.Typer(
    help="""List and clear what is kept to save time.

    Decoded images, their features, and encoders; all can be made again.

    Examples:

      metadiff cache list

      metadiff cache clear features --yes
    """,
    no_args_is_help=True,
)

KINDS = {
    "images": "decoded images, made again from their files",
    "features": "features of images, made again by the encoder",
    "encoders": "encoders that `metatrain` finds by settings and data; trained again, which can take hours",
}
# our names begin with a hash, and `.tmp` with six letters is of safetensors: anything else is not ours to delete
OURS = re.compile(r"\.?s?[0-9a-f]{31,}\b.*|\.tmp\w{6}")


@dataclass(frozen=True)
class Entry:
    """Something in the cache: a file or folder named by a hash."""

    kind: str
    path: Path
    size: int
    files: int
    modified: float


@app.command("list")
def list_cache(as_json: options.AsJson = False) -> None:
    """Show what the cache holds, how much of it, and where.

    METADIFF_CACHE_DIR moves it.

    Examples:

      metadiff cache list

      metadiff cache list --json
    """
    screen, root = Screen(), cache_dir()
    rows: list[dict[str, Any]] = []
    for kind, what in KINDS.items():
        found = list(entries(root, kind))
        newest = max((e.modified for e in found), default=None)
        rows.append({
            "kind": kind, "what": what, "files": sum(e.files for e in found), "bytes": sum(e.size for e in found),
            "newest": None if newest is None else time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(newest)),
        })  # fmt: skip
    if as_json:
        screen.json({"schema": "metadiff.cache/1", "folder": str(root), "kinds": rows})
        return
    cells = [(r["kind"], r["what"], str(r["files"]), in_units(r["bytes"]), r["newest"] or "") for r in rows]
    screen.table(f"Cache in {root}", ("kind", "what", "files", "size", "newest"), cells, left=2)
    screen.note("`metadiff cache clear [KIND ...]` removes it; METADIFF_CACHE_DIR moves it")


@app.command("clear")
def clear(
    kinds: Annotated[
        list[str] | None,
        typer.Argument(
            help=options.shown("images, features, encoders.", "all of them"), autocompletion=completions.cache_kinds
        ),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.", rich_help_panel=options.COMMON)] = False,
    quiet: options.Quiet = False,
) -> None:
    """Remove what the cache holds, after asking.

    Only what metadiff named itself is removed, never anything else.

    Examples:

      metadiff cache clear features --yes

      metadiff cache clear --yes
    """
    screen, root = Screen(quiet=quiet), cache_dir()
    for kind in kinds or []:
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
    screen.note(f"removed {total} from {root}")
    if failed:
        raise MetaDiffError(f"{len(failed)} files could not be removed, such as {failed[0].path}",
                            hint="check the permissions of the cache folder")  # fmt: skip


def entries(root: Path, kind: str) -> Iterator[Entry]:
    """What is ours directly in the folder of a kind. A folder that is a link leads elsewhere and counts as empty."""
    folder = root / kind
    if folder.is_symlink() or not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        if OURS.fullmatch(path.name):
            with suppress(FileNotFoundError):  # another process works there
                yield _entry(kind, path)


def in_units(size: float) -> str:
    """Bytes as a person reads them."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def _entry(kind: str, path: Path) -> Entry:
    status = path.lstat()
    size, files = status.st_size, 1
    if stat.S_ISDIR(status.st_mode):
        inside = [Path(place, name).lstat() for place, _, names in os.walk(path) for name in names]
        size, files = sum(s.st_size for s in inside), len(inside)
    return Entry(kind, path, size, files, status.st_mtime)


def _remove(entry: Entry) -> bool:
    """Whether it is gone. A link is removed itself, never what it leads to."""
    try:
        if entry.path.is_dir() and not entry.path.is_symlink():
            shutil.rmtree(entry.path)
        else:
            entry.path.unlink(missing_ok=True)
    except OSError:
        return False
    return True


def _agreed(question: str, screen: Screen) -> bool:
    """A person's yes; no answer, as where nobody is there to give one, is a no."""
    screen.ask(f"{question} [y/N]")
    answer = sys.stdin.readline()
    if not answer.endswith("\n"):  # nobody pressed Enter
        screen.note("")
    return answer.strip().lower() in ("y", "yes")
