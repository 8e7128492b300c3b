"""A known data set into its place: downloaded through torchvision, or from archives that a person has.

Everything happens in a new folder beside the place, which is checked and then renamed: a failed try leaves nothing.
"""

import contextlib
import io
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from metadiff_cli.data.archives import Progress, unpack
from metadiff_cli.data.folders import Dataset, open_dataset, subfolders
from metadiff_cli.data.known import Known
from metadiff_cli.errors import ConfigError, DataError, MetaDiffError
from metadiff_cli.files import usual_mode

DEEPEST = 3  # folders that an archive may wrap around a data set


def prepare(
    known: Known, root: Path, archives: Sequence[Path], progress: Progress = lambda done, total: None
) -> Dataset:
    """The data set in `root`/<name>: as it is there, else unpacked from `archives`, else downloaded.

    Raises DataError when it cannot be had or is not what it should be, ConfigError when other things are in its place.
    """
    place = root / known.name
    if place.is_dir() and any(place.iterdir()):
        return _already_there(known, place)
    if not archives and not known.download:
        command = f"metadiff data prepare {known.name} --root {root} --from-archive FILE"
        raise DataError(
            f"{known.name} has no download here: get it at {known.home} (licence: {known.licence})",
            hint=f"{command} (FILE: {known.archives})",
        )
    with _new_folder(place) as work:
        if archives:
            for archive in archives:
                unpack(archive, work, progress)
        else:
            _download(known, work, root)
        _rename(_find(known, work), place)
    return open_dataset(place, layout=known.name)


def _already_there(known: Known, place: Path) -> Dataset:
    try:
        return open_dataset(place, layout=known.name)
    except DataError as error:
        raise ConfigError(
            f"{place} holds something else ({error.message})", hint="empty it, or give another --root"
        ) from error


@contextmanager
def _new_folder(place: Path) -> Iterator[Path]:
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
    if place.is_dir():
        place.rmdir()  # empty: looked at before
    os.replace(found, place)


def _find(known: Known, work: Path) -> Path:
    """The folder in which the data set lies: `work`, or one that an archive wrapped around it."""
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
    """Through torchvision, which checks the files' MD5. Raises DataError that says how to go on by hand."""
    urls, fetch = DOWNLOADS[known.name]
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints, and stdout is for results
            fetch(work)
    except (OSError, RuntimeError, EOFError, ValueError) as error:  # URLError is an OSError, a wrong MD5 a RuntimeError
        files = " ".join(f"--from-archive {url.rsplit('/', 1)[1]}" for url in urls())
        command = f"metadiff data prepare {known.name} --root {root}"
        raise DataError(
            f"{known.name} could not be downloaded ({_reason(error)})",
            hint=f"get {' and '.join(urls())} with a browser, then: {command} {files}",
        ) from error
    for archive in [*work.rglob("*.zip"), *work.rglob("*.tar.gz")]:
        archive.unlink()


def _reason(error: Exception) -> str:
    return (str(getattr(error, "reason", "")) or str(error) or type(error).__name__).splitlines()[0]


def _datasets() -> Any:
    from torchvision import datasets  # type: ignore[import-untyped]

    return datasets


def _omniglot(work: Path) -> None:
    for background in (True, False):
        _datasets().Omniglot(work, background=background, download=True)


def _omniglot_urls() -> list[str]:
    omniglot = _datasets().Omniglot
    return [f"{omniglot.download_url_prefix}/{part}.zip" for part in omniglot.zips_md5]


def _cifar(work: Path) -> None:
    _datasets().CIFAR100(work, download=True)


def _cifar_urls() -> list[str]:
    return [_datasets().CIFAR100.url]


DOWNLOADS: dict[str, tuple[Callable[[], list[str]], Callable[[Path], None]]] = {
    "omniglot": (_omniglot_urls, _omniglot),
    "cifar-fs": (_cifar_urls, _cifar),
    "fc100": (_cifar_urls, _cifar),
}
