"""Where things are on this computer, and how a file is written so that readers see the old one or the new one."""

import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import platformdirs

from metadiff_cli.errors import CheckpointError

APP = "metadiff"
PACKAGED = Path(__file__).parent / "checkpoints" / "default.safetensors"
LEFTOVER = re.compile(r"\..+\.tmp|\.tmp\w{6}")  # files that `atomic`, or safetensors inside of it, had begun

LONG = 200  # bytes of a file's name, of which most file systems take 255


def cache_dir() -> Path:
    """What can be made again: decoded images, features, encoders found by preset."""
    return Path(os.environ.get("METADIFF_CACHE_DIR") or platformdirs.user_cache_path(APP))


def data_dir(name: str) -> Path:
    """Where the data set `name` is looked for when no `--data` is given."""
    return Path(os.environ.get("METADIFF_DATA_DIR") or platformdirs.user_data_path(APP)) / name


def checkpoint_path(given: Path | None) -> Path:
    """`given`, or the checkpoint that comes with the package. Raises CheckpointError when that one is missing."""
    if given is not None:
        return given
    if not PACKAGED.is_file():
        raise CheckpointError(
            f"the checkpoint that comes with the package is missing ({PACKAGED})",
            hint="install metadiff again, or give a checkpoint of `metadiff metatrain` with --checkpoint",
        )
    return PACKAGED


def writable(folder: Path) -> Path:
    """`folder`, or where nothing can be written there, one of the same name among the person's temporary files."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        instead = _own_temporary() / folder.name
        instead.mkdir(exist_ok=True)
        return instead


def _own_temporary() -> Path:
    """One folder per user, found again by later runs; a new one where its name is taken by somebody else."""
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
    """Yield a temporary path beside `path`; on success it is synced and renamed to `path`, on failure it is gone.

    Whatever happens, the power cut included, `path` is the old file or the whole new one. With `new`, raises
    FileExistsError where there is one already. An OSError, as of a full disk, names `path` when it names no file.
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
    """Copy a file's content to `path`, see `atomic`, and its times and permissions as far as possible."""
    with atomic(path, new=new) as temporary:
        shutil.copyfile(source, temporary)
    with suppress(OSError):  # last: a read-only file could not be opened again, and some file systems keep neither
        shutil.copystat(source, path)


def reserve(path: Path) -> None:
    """Take the room of a sparse file: a memory-mapped one that outgrows its disk ends the process with a bus error."""
    if hasattr(os, "posix_fallocate"):
        with path.open("rb+") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def sweep(folder: Path, name: str | None = None) -> None:
    """Remove what writers that were killed had begun, of the file `name` or of all.

    Only for whoever holds the lock of that file, or of the folder.
    """
    wanted = LEFTOVER if name is None else re.compile(rf"\.{re.escape(name)}\.\w+\.tmp")
    for path in folder.iterdir():
        if wanted.fullmatch(path.name) and not path.is_dir():
            path.unlink(missing_ok=True)


def _rename_new(temporary: Path, path: Path) -> None:
    try:
        os.link(temporary, path)  # fails where there is a file, unlike a renaming
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        os.replace(temporary, path)


def _sync_folder(folder: Path) -> None:
    """Make a renaming last; not every system lets a folder be opened for that."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def usual_mode(bits: int = 0o666) -> int:
    """Permissions of a new file, or of a folder with 0o777, as the person's umask has them."""
    current = os.umask(0)
    os.umask(current)
    return bits & ~current
