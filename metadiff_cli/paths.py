"""Where things are on this computer, and how a file is written so that readers see the old one or the new one."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import platformdirs

APP = "metadiff"


def cache_dir() -> Path:
    """What can be made again: decoded images, features, encoders found by preset."""
    return Path(os.environ.get("METADIFF_CACHE_DIR") or platformdirs.user_cache_path(APP))


def data_dir(name: str) -> Path:
    """Where the data set `name` is looked for when no `--data` is given."""
    return Path(os.environ.get("METADIFF_DATA_DIR") or platformdirs.user_data_path(APP)) / name


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is synced and renamed to `path`, on failure it is gone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp's 0600 would hide results from a group that shares the folder
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` atomically, as UTF-8."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")  # the same bytes on every system


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
