"""Decoded images on disk: a data set is decoded once into a memory-mapped uint8 array, keyed by its content.

Two steps, so that a second run starts at once and a moved or copied folder is not decoded again:
  signature  names, sizes and times of all files: cheap, names an index file that holds the key
  key        hash of all bytes, labels and class names: names the array
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from metadiff_cli.data.folders import Split
from metadiff_cli.data.images import load_square
from metadiff_cli.errors import DataError
from metadiff_cli.paths import atomic, write_text

VERSION = 1  # of the decoding: part of every key
WINDOW = 8  # images under way per worker: bounds the memory, keeps the order

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class DecodedSplit:
    """The images of a split that could be read: `images` (n, S, S, 3) uint8, memory-mapped; `labels` (n,)."""

    name: str
    classes: tuple[str, ...]
    paths: tuple[str, ...]
    labels: np.ndarray
    images: np.ndarray
    broken: tuple[tuple[str, str], ...]
    key: str


def no_progress(done: int, total: int) -> None:
    """Report nothing."""


def decode_split(
    split: Split, size: int, folder: Path, *, workers: int | None = None, progress: Progress = no_progress
) -> DecodedSplit:
    """The decoded images of a split, from `folder` when they are there, else decoded in parallel and kept.

    A folder that cannot be written to is replaced by a temporary one. Raises DataError when a class has no image that
    can be read.
    """
    folder = _writable(folder)
    index = folder / f"{_signature(split, size)}.json"
    with FileLock(f"{index}.lock"):
        found = _lookup(split, folder, index)
        if found is None:
            key, broken = _fill(split, size, folder, workers, progress)
            write_text(index, json.dumps({"key": key, "broken": broken}))
            found = _lookup(split, folder, index)
    assert found is not None
    return found


def decode_images(
    paths: Sequence[Path], size: int, *, workers: int | None = None
) -> Iterator[tuple[Path, np.ndarray | str]]:
    """Pixels (size, size, 3) of each file, or the reason why there are none; in order, a few at a time."""

    def decode(path: Path) -> np.ndarray | str:
        try:
            return load_square(path, size)
        except DataError as error:
            return error.message.removeprefix(f"{path}: ")

    workers = workers or os.cpu_count() or 1
    with ThreadPoolExecutor(workers) as pool:
        pending: list[tuple[Path, Future[np.ndarray | str]]] = []
        for path in paths:
            pending.append((path, pool.submit(decode, path)))
            if len(pending) >= workers * WINDOW:
                first, future = pending.pop(0)
                yield first, future.result()
        for first, future in pending:
            yield first, future.result()


def channel_statistics(images: np.ndarray, limit: int = 4096) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel, in 0..1, of at most `limit` evenly spaced images (n, S, S, 3)."""
    chosen = np.unique(np.linspace(0, len(images) - 1, min(limit, len(images))).astype(np.int64))
    pixels = np.asarray(images[chosen], dtype=np.float64) / 255
    mean, std = pixels.mean(axis=(0, 1, 2)), pixels.std(axis=(0, 1, 2))
    return [float(m) for m in mean], [float(max(s, 1e-3)) for s in std]


def _signature(split: Split, size: int) -> str:
    """Hash of what a listing shows of the files; for images that are no files, of the pixels."""
    digest = _digest(split, size)
    if split.pixels is not None:
        digest.update(np.ascontiguousarray(split.pixels).tobytes())
    else:
        for path in split.paths:
            status = _stat(path)
            digest.update(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return "s" + digest.hexdigest()[:31]


def _stat(path: str) -> os.stat_result:
    try:
        return os.stat(path)
    except OSError as error:
        raise DataError(f"{path} is gone ({error.strerror})", hint="run the command again") from error


def _digest(split: Split, size: int) -> Any:
    head = {"version": VERSION, "size": size, "classes": split.classes, "labels": split.labels}
    return hashlib.sha256(json.dumps(head).encode())


def _content_key(split: Split, size: int) -> str:
    digest = _digest(split, size)
    if split.pixels is not None:
        digest.update(np.ascontiguousarray(split.pixels).tobytes())
    else:
        for path in split.paths:
            try:
                digest.update(hashlib.sha256(Path(path).read_bytes()).digest())
            except OSError as error:
                digest.update(f"unreadable {error.errno}".encode())
    return str(digest.hexdigest()[:32])


def _lookup(split: Split, folder: Path, index: Path) -> DecodedSplit | None:
    """What the index points at; None when index or array are missing or damaged, so that they are made again."""
    try:
        entry = json.loads(index.read_text(encoding="utf-8"))
        array: np.ndarray = np.load(folder / f"{entry['key']}.npy", mmap_mode="r", allow_pickle=False)
        broken = tuple((split.paths[i], str(reason)) for i, reason in entry["broken"])
        unreadable = {int(i) for i, _ in entry["broken"]}
    except (OSError, ValueError, KeyError, TypeError, IndexError, EOFError):
        return None
    rows = [i for i in range(len(split.paths)) if i not in unreadable]
    if len(array) != len(rows):
        return None
    labels = np.array([split.labels[i] for i in rows], dtype=np.int64)
    return DecodedSplit(
        split.name, split.classes, tuple(split.paths[i] for i in rows), labels, array, broken, str(entry["key"])
    )


def _fill(
    split: Split, size: int, folder: Path, workers: int | None, progress: Progress
) -> tuple[str, list[tuple[int, str]]]:
    """Decode into <key>.npy unless another folder with the same content did; returns key and broken images."""
    key = _content_key(split, size)
    array, facts = folder / f"{key}.npy", folder / f"{key}.json"
    with FileLock(f"{array}.lock"):
        if array.is_file() and facts.is_file():
            try:
                np.load(array, mmap_mode="r", allow_pickle=False)
                return key, [(int(i), str(r)) for i, r in json.loads(facts.read_text(encoding="utf-8"))]
            except (OSError, ValueError, TypeError, EOFError):
                pass  # damaged: decoded again below
        broken = _decode_into(split, size, array, workers, progress)
        write_text(facts, json.dumps(broken))
    return key, broken


def _decode_into(
    split: Split, size: int, array: Path, workers: int | None, progress: Progress
) -> list[tuple[int, str]]:
    broken: list[tuple[int, str]] = []
    total = len(split.paths)
    with atomic(array) as temporary:
        out = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=(total, size, size, 3))
        for i, pixels in enumerate(_pixels(split, size, workers)):
            if isinstance(pixels, str):
                broken.append((i, pixels))
            else:
                out[i - len(broken)] = pixels
            progress(i + 1, total)
        out.flush()
        del out
        _check_classes(split, broken)
        if broken:
            _shorten(temporary, total - len(broken))
    return broken


def _shorten(path: Path, count: int) -> None:
    """Keep the first `count` images: the broken ones left room at the end."""
    whole = np.load(path, mmap_mode="r", allow_pickle=False)
    with tempfile.TemporaryDirectory(dir=path.parent) as place:
        shorter = Path(place) / "images.npy"
        np.save(shorter, whole[:count])
        os.replace(shorter, path)


def _pixels(split: Split, size: int, workers: int | None) -> Iterator[np.ndarray | str]:
    if split.pixels is None:
        for _, pixels in decode_images([Path(path) for path in split.paths], size, workers=workers):
            yield pixels
        return
    from PIL import Image

    from metadiff_cli.data.images import to_square

    for pixels in split.pixels:
        yield to_square(Image.fromarray(pixels), size)


def _check_classes(split: Split, broken: list[tuple[int, str]]) -> None:
    bad = {i for i, _ in broken}
    alive = {label for i, label in enumerate(split.labels) if i not in bad}
    for label, cls in enumerate(split.classes):
        if label not in alive:
            raise DataError(f"none of the images of class '{cls}' can be read", hint="replace them or remove the class")


def _writable(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        return Path(tempfile.mkdtemp(prefix="metadiff-"))
