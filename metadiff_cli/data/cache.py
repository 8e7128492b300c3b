"""The cache of decoded images: a data set is decoded once into a memory-mapped uint8 array, keyed by its content.

There are two hashes, so that a second run starts at once and a moved or copied folder is not decoded again:
  signature  of names, sizes and times of all files: cheap; it names an index file that holds the key
  key        of all bytes, labels and class names: it names the array
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
from filelock import FileLock
from PIL import Image

from metadiff_cli.data.folders import Split
from metadiff_cli.data.images import load_square, to_square
from metadiff_cli.errors import DataError
from metadiff_cli.files import atomic, release, reserve, sweep, writable, write_text

VERSION = 2  # of the decoding, as part of every key: 2 decodes large JPEG files in full
RELEASE = 1024  # images after which the memory of the written ones is given back
WINDOW = 8  # images in progress per worker: bounds the memory, keeps the order

Progress = Callable[[int, int], None]
Item = TypeVar("Item")
Done = TypeVar("Done")


@dataclass(frozen=True)
class DecodedSplit:
    """The readable images of a split: `images` (n, S, S, 3) uint8, memory-mapped, with `labels` (n,) int64.

    `broken` has path and reason of the other ones. `key` identifies images, labels, class names and size.
    """

    name: str
    classes: tuple[str, ...]
    paths: tuple[str, ...]
    labels: np.ndarray
    images: np.ndarray
    broken: tuple[tuple[str, str], ...]
    key: str
    notes: tuple[str, ...] = ()


class _Hash(Protocol):
    def update(self, data: bytes, /) -> None: ...

    def hexdigest(self) -> str: ...


def no_progress(done: int, total: int) -> None:
    """Report nothing."""


def decode_split(
    split: Split, size: int, folder: Path, *, workers: int | None = None, progress: Progress = no_progress
) -> DecodedSplit:
    """The decoded images (size x size) of a split: from `folder` if they are there, else decoded in parallel and kept.

    If `folder` cannot be written to, a temporary folder is used and `notes` says so. Raises DataError if no image of a
    class can be read.
    """
    assert split.paths, "a split has images"
    signature = _signature(split, size)
    found = _lookup(split, size, folder, signature)  # no lock: files appear whole, and the folder may be read-only
    if found is not None:
        return found
    place = writable(folder)
    with FileLock(place / f"{signature}.lock"):
        found = _lookup(split, size, place, signature)
        if found is None:
            key, broken = _fill(split, size, place, workers, progress)
            write_text(place / f"{signature}.json", json.dumps({"key": key, "broken": broken}))
            found = _lookup(split, size, place, signature)
    assert found is not None
    note = f"{folder} cannot be written to: decoded images are kept in {place}"
    return found if place == folder else replace(found, notes=(note,))


def decoded_already(split: Split, size: int, folder: Path) -> DecodedSplit | None:
    """What `decode_split` would take from `folder`, or None if it would have to decode."""
    return _lookup(split, size, folder, _signature(split, size))


def decode_images(
    paths: Sequence[Path], size: int, *, workers: int | None = None
) -> Iterator[tuple[Path, np.ndarray | str]]:
    """The pixels (size, size, 3) uint8 of each file, or the reason why it cannot be read; in order, a few at a time."""

    def decode(path: Path) -> np.ndarray | str:
        try:
            return load_square(path, size)
        except DataError as error:
            return error.message.removeprefix(f"{path}: ")

    return zip(paths, in_order(paths, decode, workers), strict=True)


def in_order(items: Sequence[Item], work: Callable[[Item], Done], workers: int | None = None) -> Iterator[Done]:
    """The results of `work` for each item, in order; several threads work on a few items at a time."""
    workers = workers or os.cpu_count() or 1
    with ThreadPoolExecutor(workers) as pool:
        pending: deque[Future[Done]] = deque()
        for item in items:
            pending.append(pool.submit(work, item))
            if len(pending) >= workers * WINDOW:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def channel_statistics(images: np.ndarray, limit: int = 4096) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel, in 0..1, of at most `limit` of the images (n, S, S, 3) uint8."""
    chosen = np.unique(np.linspace(0, len(images) - 1, min(limit, len(images))).astype(np.int64))
    counts = np.zeros((3, 256), dtype=np.int64)  # a histogram is exact and needs no copy of the images as floats
    for row in chosen:
        for channel in range(3):
            counts[channel] += np.bincount(images[row, ..., channel].ravel(), minlength=256)
    shares, levels = counts / counts.sum(axis=1, keepdims=True), np.arange(256) / 255
    mean = shares @ levels  # (3,)
    std = np.sqrt((shares * (levels - mean[:, None]) ** 2).sum(axis=1))
    return [float(m) for m in mean], [float(max(s, 1e-3)) for s in std]


def _signature(split: Split, size: int) -> str:
    """The hash of names, sizes and times of the files; for images that are not files, of the pixels."""
    digest = _digest(split, size)
    if split.pixels is not None:
        digest.update(np.ascontiguousarray(split.pixels).tobytes())
    else:
        for path in split.paths:
            digest.update(f"{path}\0{_facts(path)}\n".encode(errors="surrogateescape"))
    return "s" + digest.hexdigest()[:31]


def _facts(path: str) -> str:
    """Size and times of a file; a file without access has none, and turns out as an image that cannot be read."""
    try:
        status = os.stat(path)
    except OSError as error:
        return f"unreadable {error.errno}"
    return (
        f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"  # ctime: permissions, and edits with mtime kept
    )


def _digest(split: Split, size: int) -> _Hash:
    """A hash to be continued, of all but the images."""
    head = {"version": VERSION, "size": size, "classes": split.classes, "labels": split.labels}
    return hashlib.sha256(json.dumps(head).encode())


def _content_key(split: Split, size: int) -> str:
    """The hash of labels, class names and the bytes of all images."""
    digest = _digest(split, size)
    if split.pixels is not None:
        digest.update(np.ascontiguousarray(split.pixels).tobytes())
    else:
        for path in split.paths:
            try:
                digest.update(hashlib.sha256(Path(path).read_bytes()).digest())
            except OSError as error:
                digest.update(f"unreadable {error.errno}".encode())
    return digest.hexdigest()[:32]


def _lookup(split: Split, size: int, folder: Path, signature: str) -> DecodedSplit | None:
    """What the index points at, or None if index or array are missing or damaged, so that they are made again."""
    try:
        entry = json.loads((folder / f"{signature}.json").read_text(encoding="utf-8"))
        key, reasons = str(entry["key"]), {int(i): str(reason) for i, reason in entry["broken"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    rows = [i for i in range(len(split.paths)) if i not in reasons]
    array = _open_array(folder / f"{key}.npy", len(split.paths) - len(reasons), size)
    if array is None or len(rows) != len(array):
        return None
    labels = np.array([split.labels[i] for i in rows], dtype=np.int64)
    broken = tuple((split.paths[i], reason) for i, reason in reasons.items())
    return DecodedSplit(split.name, split.classes, tuple(split.paths[i] for i in rows), labels, array, broken, key)


def _open_array(path: Path, count: int, size: int) -> np.ndarray | None:
    """The array (count, size, size, 3) of a cache file, read-only; None if it is missing, cut short or another one."""
    try:
        array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return array if array.shape == (count, size, size, 3) and array.dtype == np.uint8 else None


def _fill(
    split: Split, size: int, folder: Path, workers: int | None, progress: Progress
) -> tuple[str, list[tuple[int, str]]]:
    """Decode into <key>.npy, unless another folder with the same content did; returns the key and the broken images."""
    key = _content_key(split, size)
    array, facts = folder / f"{key}.npy", folder / f"{key}.json"
    with FileLock(f"{array}.lock"):
        broken = _known_broken(facts, len(split.paths))
        if broken is None or _open_array(array, len(split.paths) - len(broken), size) is None:
            broken = _decode_into(split, size, array, workers, progress)
            write_text(facts, json.dumps(broken))
    return key, broken


def _known_broken(facts: Path, total: int) -> list[tuple[int, str]] | None:
    """The broken images of an array that was decoded before, or None if its facts are missing or damaged."""
    try:
        broken = {int(i): str(reason) for i, reason in json.loads(facts.read_text(encoding="utf-8"))}
    except (OSError, ValueError, TypeError):
        return None
    return list(broken.items()) if all(0 <= i < total for i in broken) else None


def _decode_into(
    split: Split, size: int, array: Path, workers: int | None, progress: Progress
) -> list[tuple[int, str]]:
    """Decode all images into a new array file; returns row and reason of the broken ones. Raises DataError."""
    broken: list[tuple[int, str]] = []
    total = len(split.paths)
    sweep(array.parent, array.name)
    _check_room(array.parent, total * size * size * 3)
    with atomic(array) as temporary:
        out = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=(total, size, size, 3))
        reserve(temporary)
        for i, pixels in enumerate(_pixels(split, size, workers)):
            if isinstance(pixels, str):
                broken.append((i, pixels))
            else:
                out[i - len(broken)] = pixels
            if i % RELEASE == 0:
                release(out)
            progress(i + 1, total)
        out.flush()
        del out
        _check_classes(split, broken)
        if broken:
            _shorten(temporary, total - len(broken))
    return broken


def _check_room(folder: Path, needed: int) -> None:
    """Raise DataError for a disk that is too small: a memory-mapped file that outgrows it ends in a bus error."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DataError(
            f"decoded images need {needed / 1e9:.1f} GB, {folder} has {free / 1e9:.1f} GB left",
            hint="make room, or set METADIFF_CACHE_DIR to a folder on another disk",
        )


def _shorten(path: Path, count: int) -> None:
    """Keep the first `count` images of an array file: the broken ones left room at its end."""
    whole = np.load(path, mmap_mode="r", allow_pickle=False)
    with tempfile.TemporaryDirectory(dir=path.parent) as place:
        shorter = Path(place) / "images.npy"
        np.save(shorter, whole[:count])
        del whole  # some systems replace no file that is still mapped
        os.replace(shorter, path)


def _pixels(split: Split, size: int, workers: int | None) -> Iterator[np.ndarray | str]:
    """The pixels of each image of a split, or the reason why it cannot be read."""
    if split.pixels is not None:
        yield from (to_square(Image.fromarray(pixels), size) for pixels in split.pixels)
    else:
        yield from (found for _, found in decode_images([Path(p) for p in split.paths], size, workers=workers))


def _check_classes(split: Split, broken: list[tuple[int, str]]) -> None:
    """Raise DataError for a class all of whose images are broken."""
    bad = {i for i, _ in broken}
    alive = {label for i, label in enumerate(split.labels) if i not in bad}
    for label, cls in enumerate(split.classes):
        if label not in alive:
            first = next(reason for i, reason in broken if split.labels[i] == label)
            raise DataError(
                f"none of the images of class '{cls}' can be read: the first is {first}",
                hint="replace them or remove the class",
            )
