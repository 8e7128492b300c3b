"""The folders that metadiff uses on this computer, and safe ways to write files in them."""

import errno
import mmap
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import platformdirs

from metadiff_cli.errors import CheckpointError, ConfigError

APP = "metadiff"
PACKAGED = Path(__file__).parent / "checkpoints" / "default.safetensors"
DEMO = Path(__file__).parent / "demo"  # the pictures of `metadiff demo`
# temporary files of `atomic`, and of safetensors inside it; a user's own `.notes.tmp` is none
LEFTOVER = re.compile(r"\..+\.[a-z0-9_]{8}\.tmp|\.tmp[A-Za-z0-9]{6}")

LFS_POINTER = b"version https://git-lfs"  # a pointer to a large file that git did not fetch begins so

LONG = 200  # bytes of a file's name, of which most file systems take 255


def cache_dir() -> Path:
    """The folder of what can be made again: decoded images, features, encoders that were found by preset.

    Raises ConfigError if METADIFF_CACHE_DIR is empty or leads to a file.
    """
    return _own_folder("METADIFF_CACHE_DIR", platformdirs.user_cache_path, "cache")


def data_dir(name: str) -> Path:
    """The folder where the data set `name` is looked for if no `--data` is given.

    Raises ConfigError if METADIFF_DATA_DIR is empty or leads to a file.
    """
    return _own_folder("METADIFF_DATA_DIR", platformdirs.user_data_path, "data") / name


def checkpoint_path(given: Path | None) -> Path:
    """`given`, or the checkpoint that comes with the package. Raises CheckpointError if that one is missing."""
    if given is not None:
        return given
    if not PACKAGED.is_file():
        raise CheckpointError(
            f"the checkpoint that comes with the package is missing ({PACKAGED})",
            hint="install metadiff again, or give a checkpoint of `metadiff metatrain` with --checkpoint",
        )
    return PACKAGED


def without_home() -> str | None:
    """What to tell a user without a home folder, as in some containers; None if there is one."""
    try:
        platformdirs.user_cache_path(APP)
    except RuntimeError:
        return (
            f"there is no home folder (set HOME), so the cache is in {_own_temporary()} until that is removed; "
            "METADIFF_CACHE_DIR moves it"
        )
    return None


def _own_folder(variable: str, usual: Callable[[str], Path], name: str) -> Path:
    """The folder in an environment variable, or the platform's `usual` one, or without a home a temporary one."""
    given = os.environ.get(variable)
    if given is None:
        try:
            return usual(APP)
        except RuntimeError:
            return _own_temporary() / name
    if not given.strip():
        raise ConfigError(f"{variable} is empty", hint=f"give it a folder, or `unset {variable}`")
    folder = Path(os.path.expanduser(given))
    if os.path.lexists(folder) and not os.path.isdir(folder):
        raise ConfigError(f"{variable} is {given}, which is not a folder", hint="give it a folder")
    return folder


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

    At every moment `path` is the old file or the whole new one, even if the power is cut. A file that is replaced
    keeps its permissions; a link stays, and what it leads to is replaced; a device or pipe is written to. With `new`,
    raises FileExistsError if `path` exists. An OSError without a file name, such as that of a full disk, gets the name
    `path`.
    """
    given, path = path, Path(os.path.realpath(path)) if path.is_symlink() else path
    special = path.exists() and not path.is_file()
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(given))
    if new and os.path.lexists(given):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(given))
    folder = Path(tempfile.gettempdir()) if special else path.parent
    folder.mkdir(parents=True, exist_ok=True)
    short = path.name if len(os.fsencode(path.name)) < LONG else path.name[:40]  # of four bytes each at most
    handle, name = tempfile.mkstemp(prefix=f".{short}.", suffix=".tmp", dir=folder)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        if special:
            path.write_bytes(temporary.read_bytes())
            return
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        # mkstemp's 0600 would hide results from a group that shares the folder
        temporary.chmod(stat.S_IMODE(path.stat().st_mode) if path.is_file() else usual_mode())
        (_rename_new if new else os.replace)(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        if error.filename is None:
            error.filename = str(given)
        raise
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


def write_text(path: Path, text: str) -> None:
    r"""Write `text` to `path` atomically, as UTF-8.

    Bytes of file names that are no text become escapes such as \udce9, which JSON reads back.
    """
    with atomic(path) as temporary:  # the newline: the same bytes on every system
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")


def copy_file(source: Path, path: Path, *, new: bool = False) -> None:
    """Copy a file to `path`, with its times and permissions if possible; see `atomic` for `new` and the errors."""
    with atomic(path, new=new) as temporary:
        shutil.copyfile(source, temporary)
    with suppress(OSError):  # last: a read-only file could not be opened again; some file systems have none
        shutil.copystat(source, path)


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
    wanted = LEFTOVER if name is None else re.compile(rf"\.{re.escape(name)}\.[a-z0-9_]{{8}}\.tmp")
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
