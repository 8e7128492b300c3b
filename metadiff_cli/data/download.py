"""Known data sets into their places: downloaded through torchvision, or unpacked from archives that a user has.

Everything happens in a new folder beside the place, which is checked and then renamed: a failed try leaves nothing.
Archives come from strangers. Links and devices are refused, as no data set has any, and so is whatever would be written
outside the target or over another file.
"""

import contextlib
import importlib
import io
import os
import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from metadiff_cli.data.benchmarks import Known, open_dataset
from metadiff_cli.data.folders import Dataset
from metadiff_cli.data.scan import subfolders
from metadiff_cli.errors import ConfigError, DataError, MetaDiffError
from metadiff_cli.files import usual_mode

DEEPEST = 3  # folders that an archive may wrap around a data set
MAX_FILES = 2_000_000  # in an archive; ImageNet has 1.3 million
SPARE = 1 << 28  # bytes of disk that stay free

Progress = Callable[[int, int], None]


def prepare(
    known: Known, root: Path, archives: Sequence[Path], progress: Progress = lambda done, total: None
) -> Dataset:
    """The data set in `root`/<name>: as it is there, else unpacked from `archives`, else downloaded.

    Raises DataError if it cannot be had or is not what it should be, ConfigError if its place holds other things.
    """
    place = root / known.name
    if place.is_symlink():
        place = place.resolve()  # to another disk, say: the link stays
    if os.path.lexists(place) and not place.is_dir():
        raise ConfigError(f"{place} is a file, not a folder", hint="remove it, or give another --root")
    if place.is_dir() and any(place.iterdir()):
        return _already_there(known, place)
    if not archives and not known.download:
        command = f"metadiff data prepare {known.name} --root {root} --from-archive FILE"
        raise DataError(
            f"metadiff cannot download {known.name}: get it at {known.home} (licence: {known.licence})",
            hint=f"{command} (FILE: {known.archives})",
        )
    with _new_folder(place) as work:
        for archive in archives:
            unpack(archive, work, progress)
        if not archives:
            _download(known, work, root)
        _rename(_find(known, work), place)
    return open_dataset(place, layout=known.name)


def unpack(archive: Path, target: Path, progress: Progress = lambda done, total: None) -> int:
    """Write all files of a zip or tar archive below `target`; returns how many.

    Raises DataError for a file that is not an archive or is damaged, for links and devices in it, for files that would
    be written outside `target` or over another one, and if the disk is too small. What was written until then is left.
    """
    with _opened(archive) as members:
        for member in members:
            _check_member(archive, member)
        _check_room(archive, target, sum(member.size for member in members))
        for i, member in enumerate(members):
            if os.path.lexists(target / member.name):
                raise _refused(archive, member.name, "already exists, or is in it twice")
            member.extract(path=target)
            progress(i + 1, len(members))
    return len(members)


@dataclass(frozen=True)
class Member:
    """A file in an archive: its name, its size in bytes, whether it is a regular file, and how it is extracted."""

    name: str
    size: int
    regular: bool
    extract: Callable[..., Any]


@contextmanager
def _opened(archive: Path) -> Iterator[list[Member]]:
    """The files of an archive. Errors within, also of reading them, become DataErrors."""
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as file:
                yield _listed(archive, _zip_members(file))
        else:
            with tarfile.open(archive) as tar:
                yield _listed(archive, _tar_members(tar))
    except DataError:
        raise
    except OSError as error:
        reason = error.strerror or str(error)  # gzip reports damage as an OSError without the system's reason
        raise DataError(f"{archive} cannot be unpacked ({reason})", hint="check the file and the disk") from error
    except Exception as error:  # zlib, lzma, struct: damage shows itself in many ways
        raise DataError(f"{archive} is no archive, or is damaged ({error})", hint="download it again") from error


def _zip_members(file: zipfile.ZipFile) -> Iterator[Member]:
    for info in file.infolist():
        kind = info.external_attr >> 28  # of the Unix mode; 0 if the archive was made elsewhere
        if not info.is_dir():
            yield Member(info.filename, info.file_size, kind in (0, 0o10), partial(file.extract, info))


def _tar_members(tar: tarfile.TarFile) -> Iterator[Member]:
    for info in tar:
        if not info.isdir():
            yield Member(info.name, info.size, info.isreg(), partial(tar.extract, info, filter="data"))


def _listed(archive: Path, members: Iterator[Member]) -> list[Member]:
    """At most MAX_FILES members. Raises DataError for more."""
    found: list[Member] = []
    for member in members:
        found.append(member)
        if len(found) > MAX_FILES:
            raise DataError(
                f"{archive} has more than {MAX_FILES} files", hint="unpack it yourself and check what it is"
            )
    return found


def _check_member(archive: Path, member: Member) -> None:
    """Raise DataError for a link, a device, and a name that leads out of the target.

    zipfile and tarfile would write such names inside the target, under another name.
    """
    if not member.regular:
        raise _refused(archive, member.name, "is a link or a device")
    path = PurePosixPath(member.name.replace("\\", "/"))
    odd = "\0" in member.name or (path.parts and ":" in path.parts[0])  # a drive letter
    if odd or path.is_absolute() or ".." in path.parts or not path.parts:
        raise _refused(archive, member.name, "would be written outside of the target")


def _check_room(archive: Path, target: Path, needed: int) -> None:
    free = shutil.disk_usage(target).free
    if needed + SPARE > free:
        raise DataError(
            f"{archive} unpacks to {needed / 1e9:.1f} GB, and {target} has {free / 1e9:.1f} GB left",
            hint="make room, or give --root on another disk",
        )


def _refused(archive: Path, name: str, why: str) -> DataError:
    return DataError(f"{archive} is refused: its file {name!r:.200} {why}", hint="get the archive from its home page")


def _already_there(known: Known, place: Path) -> Dataset:
    try:
        return open_dataset(place, layout=known.name)
    except DataError as error:
        raise ConfigError(
            f"{place} holds something else ({error.message})", hint="empty it, or give another --root"
        ) from error


@contextmanager
def _new_folder(place: Path) -> Iterator[Path]:
    """A new folder beside `place`, which is removed in the end unless it was renamed. Raises DataError."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=place.parent))
    except OSError as error:
        raise DataError(
            f"{place.parent} cannot be written to ({error.strerror})", hint="give another --root"
        ) from error
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _rename(found: Path, place: Path) -> None:
    if hasattr(os, "sync"):
        os.sync()  # the images before the name that says they are there
    found.chmod(usual_mode(0o777))  # mkdtemp's 0700 would hide the images from a group that shares the folder
    try:
        if place.is_dir():
            place.rmdir()  # it was empty; if it is not any more, this fails
        os.replace(found, place)
    except OSError as error:
        raise ConfigError(
            f"{place} was filled by something else meanwhile ({error.strerror})", hint="empty it, and try again"
        ) from error


def _find(known: Known, work: Path) -> Path:
    """The folder that holds the data set: `work`, or a folder that an archive wrapped around it. Raises DataError."""
    reasons: list[MetaDiffError] = []
    for folder in _candidates(work, DEEPEST):
        try:
            open_dataset(folder, layout=known.name)
            return folder
        except MetaDiffError as error:
            reasons.append(error)
    reason = reasons[0].message.replace(str(work), "the archive")
    raise DataError(
        f"what was unpacked is not {known.name} ({reason})", hint=f"expected {known.archives or 'the original files'}"
    )


def _candidates(folder: Path, deeper: int) -> Iterator[Path]:
    yield folder
    inside = subfolders(folder)
    if deeper and len(inside) == 1:
        yield from _candidates(inside[0], deeper - 1)


def _download(known: Known, work: Path, root: Path) -> None:
    """Download through torchvision, which checks the files' MD5. Raises DataError that says how to go on by hand."""
    datasets = importlib.import_module("torchvision.datasets")
    urls, fetch = DOWNLOADS[known.name]
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints, and stdout is for results
            fetch(datasets, work)
    except (OSError, RuntimeError, EOFError, ValueError) as error:  # URLError is an OSError, a wrong MD5 a RuntimeError
        needed = urls(datasets)
        files = " ".join(f"--from-archive {url.rsplit('/', 1)[1]}" for url in needed)
        command = f"metadiff data prepare {known.name} --root {root}"
        raise DataError(
            f"{known.name} could not be downloaded ({_reason(error)})",
            hint=f"get {' and '.join(needed)} with a browser, then: {command} {files}",
        ) from error
    for archive in [*work.rglob("*.zip"), *work.rglob("*.tar.gz")]:
        archive.unlink()


def _reason(error: Exception) -> str:
    return (str(getattr(error, "reason", "")) or str(error) or type(error).__name__).splitlines()[0]


def _omniglot(datasets: Any, work: Path) -> None:
    for background in (True, False):
        datasets.Omniglot(work, background=background, download=True)


def _omniglot_urls(datasets: Any) -> list[str]:
    return [f"{datasets.Omniglot.download_url_prefix}/{part}.zip" for part in datasets.Omniglot.zips_md5]


def _cifar(datasets: Any, work: Path) -> None:
    datasets.CIFAR100(work, download=True)


def _cifar_urls(datasets: Any) -> list[str]:
    return [datasets.CIFAR100.url]


# for each data set that torchvision downloads: the addresses of its files, and the download itself
DOWNLOADS: dict[str, tuple[Callable[[Any], list[str]], Callable[[Any, Path], None]]] = {
    "omniglot": (_omniglot_urls, _omniglot),
    "cifar-fs": (_cifar_urls, _cifar),
    "fc100": (_cifar_urls, _cifar),
}
