"""The folders that metadiff uses on this computer, and safe ways to write files in them."""

import mmap
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import platformdirs

APP = "metadiff"
LEFTOVER = re.compile(r"\..+\.tmp|\.tmp\w{6}")  # temporary files of `atomic`, and of safetensors inside it

LONG = 200  # bytes of a file's name, of which most file systems take 255


def cache_dir() -> Path:
    """The folder of what can be made again: decoded images, features, encoders that were found by preset."""
    return Path(os.environ.get("METADIFF_CACHE_DIR") or platformdirs.user_cache_path(APP))


def data_dir(name: str) -> Path:
    """The folder where the data set `name` is looked for if no `--data` is given."""
    return Path(os.environ.get("METADIFF_DATA_DIR") or platformdirs.user_data_path(APP)) / name


def writable(folder: Path) -> Path:
    """Return `folder`, or if it cannot be written to, one of the same name among the user's temporary files."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        instead = _own_temporary() / folder.name
        instead.mkdir(exist_ok=True)
        return instead


def _own_temporary() -> Path:
    """One temporary folder per user, which later runs find again; a new one if somebody else owns its name."""
    user = os.getuid() if hasattr(os, "getuid") else None
    place = Path(tempfile.gettempdir()) / f"metadiff-{user}"
    try:
        place.mkdir(mode=0o700, exist_ok=True)
        status = place.lstat()
        if user is not None and stat.S_ISDIR(status.st_mode) and status.st_uid == user:
            return place
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="metadiff-"))


@contextmanager
def atomic(path: Path, *, new: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `path`. On success it is synced and renamed to `path`; on failure it is removed.

    At every moment `path` is the old file or the whole new one, even if the power is cut. With `new`, raises
    FileExistsError if `path` exists. An OSError without a file name, such as that of a full disk, gets the name `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    short = path.name if len(os.fsencode(path.name)) < LONG else path.name[:40]  # of four bytes each at most
    handle, name = tempfile.mkstemp(prefix=f".{short}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        temporary.chmod(usual_mode())  # mkstemp's 0600 would hide results from a group that shares the folder
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        (_rename_new if new else os.replace)(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` atomically, as UTF-8."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")  # the same bytes on every system


def copy_file(source: Path, path: Path, *, new: bool = False) -> None:
    """Copy a file's content, times and permissions to `path`; see `atomic` for `new` and the errors."""
    with atomic(path, new=new) as temporary:
        shutil.copyfile(source, temporary)
        shutil.copystat(source, temporary)


def reserve(path: Path) -> None:
    """Allocate the whole size of a sparse file.

    A memory-mapped file that outgrows its disk ends the process with a bus error; here a full disk is an OSError.
    """
    if hasattr(os, "posix_fallocate"):
        with path.open("rb+") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def release(array: object) -> None:
    """Give back the memory of the file behind a memory-mapped NumPy array; pages that are read again are fetched again.

    What was read of a mapped file counts as memory of this process until then. Nothing is lost: what was written stays
    with the file. There is no effect on other arrays, nor on systems without madvise.
    """
    base = array
    while base is not None and not isinstance(base, mmap.mmap):  # an array has a base, a memoryview in between an obj
        base = getattr(base, "base", getattr(base, "obj", None))
    if base is not None and hasattr(mmap, "MADV_DONTNEED"):
        base.madvise(mmap.MADV_DONTNEED)


def sweep(folder: Path, name: str | None = None) -> None:
    """Remove the temporary files of writers that were killed: those of the file `name`, or all of them.

    Call it only while holding the lock of that file, or of the folder.
    """
    wanted = LEFTOVER if name is None else re.compile(rf"\.{re.escape(name)}\.\w+\.tmp")
    for path in folder.iterdir():
        if wanted.fullmatch(path.name) and not path.is_dir():
            path.unlink(missing_ok=True)


def usual_mode(bits: int = 0o666) -> int:
    """The permissions of a new file under the user's umask; for a folder give `bits` 0o777."""
    current = os.umask(0)
    os.umask(current)
    return bits & ~current


def _rename_new(temporary: Path, path: Path) -> None:
    """Rename `temporary` to `path`. Raises FileExistsError if `path` exists."""
    try:
        os.link(temporary, path)  # fails if there is a file, unlike a renaming
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        os.replace(temporary, path)


def _sync_folder(folder: Path) -> None:
    """Make a renaming permanent; some systems do not let a folder be opened for that."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
