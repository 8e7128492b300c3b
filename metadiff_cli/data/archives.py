"""Unpacking archives that come from strangers: nothing is written outside the target, and limits hold before it is.

Links, devices and special files are refused: no data set of ours has any, and a link is how an archive reaches out.
"""

import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO

from metadiff_cli.errors import DataError

MAX_FILES = 2_000_000  # ImageNet has 1.3 million
CHUNK = 1 << 20
SPARE = 1 << 28  # bytes of disk that stay free

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Member:
    """A file of an archive: where it goes below the target, its size as declared, and how its bytes are read."""

    path: PurePosixPath
    size: int
    open: Callable[[], IO[bytes]]


def unpack(archive: Path, target: Path, progress: Progress = lambda done, total: None) -> int:
    """Write all files of a zip or tar archive below `target`; returns how many.

    Raises DataError for what is no archive, is damaged, would leave the target, holds links or devices, lies about its
    sizes, or does not fit the disk. What was written until then stays for the caller to remove.
    """
    with _opened(archive) as members:
        _check_room(archive, target, members)
        for i, member in enumerate(members):
            _write(archive, member, target)
            progress(i + 1, len(members))
    return len(members)


@contextmanager
def _opened(archive: Path) -> Iterator[list[Member]]:
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as file:
                yield list(_zip_members(archive, file))
        else:
            with tarfile.open(archive) as tar:
                yield list(_tar_members(archive, tar))
    except DataError:
        raise
    except OSError as error:
        reason = error.strerror or str(error)  # gzip reports damage as OSError without a system's reason
        raise DataError(f"{archive} cannot be unpacked ({reason})", hint="check the file and the disk") from error
    except Exception as error:  # zlib, lzma, struct: damage shows itself in many ways
        raise DataError(f"{archive} is no archive, or is damaged ({error})", hint="download it again") from error


def _zip_members(archive: Path, file: zipfile.ZipFile) -> Iterator[Member]:
    _check_count(archive, len(file.infolist()))
    for info in file.infolist():
        kind = info.external_attr >> 28  # of the Unix mode; 0 where the archive was made elsewhere
        if kind not in (0, 0o10, 0o4):
            raise _refused(archive, info.filename, "is a link or a device")
        if not info.is_dir():
            yield Member(_safe(archive, info.filename), info.file_size, partial(file.open, info))


def _tar_members(archive: Path, tar: tarfile.TarFile) -> Iterator[Member]:
    for count, info in enumerate(tar):
        _check_count(archive, count)
        if info.isdir():
            continue
        if not info.isreg():
            raise _refused(archive, info.name, "is a link or a device")
        yield Member(_safe(archive, info.name), info.size, partial(_from_tar, tar, info))


def _from_tar(tar: tarfile.TarFile, info: tarfile.TarInfo) -> IO[bytes]:
    file = tar.extractfile(info)
    assert file is not None, "only regular files get here"
    return file


def _safe(archive: Path, name: str) -> PurePosixPath:
    """The relative path of a member's name. Raises DataError when it would leave the target."""
    path = PurePosixPath(name.replace("\\", "/"))
    odd = "\0" in name or (path.parts and ":" in path.parts[0])  # a drive letter
    if odd or path.is_absolute() or ".." in path.parts or not path.parts:
        raise _refused(archive, name, "would be written outside of the target")
    return path


def _check_count(archive: Path, count: int) -> None:
    if count > MAX_FILES:
        raise DataError(f"{archive} has more than {MAX_FILES} files", hint="unpack it yourself and check what it is")


def _check_room(archive: Path, target: Path, members: list[Member]) -> None:
    needed, free = sum(member.size for member in members), shutil.disk_usage(target).free
    if needed + SPARE > free:
        raise DataError(
            f"{archive} unpacks to {needed / 1e9:.1f} GB, and {target} has {free / 1e9:.1f} GB left",
            hint="make room, or give --root on another disk",
        )


def _write(archive: Path, member: Member, target: Path) -> None:
    out = target.joinpath(*member.path.parts)
    out.parent.mkdir(parents=True, exist_ok=True)
    written = 0
    with member.open() as source, out.open("xb") as file:  # x: no name twice, nothing is overwritten
        while block := source.read(CHUNK):
            written += len(block)
            if written > member.size:
                raise _refused(archive, str(member.path), "is larger than it says")
            file.write(block)
    if written != member.size:
        raise _refused(archive, str(member.path), "is shorter than it says")


def _refused(archive: Path, name: str, why: str) -> DataError:
    return DataError(f"{archive} is refused: its file {name!r:.200} {why}", hint="get the archive from its home page")
