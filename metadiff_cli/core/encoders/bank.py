"""Banks: the labelled images of a data set as features or as pixels, by rows.

A FeatureBank is made once by a frozen encoder and kept on disk. Every stage after it works on features, so an episode
costs an index and no forward pass.
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Self

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from metadiff_cli.core.distributed import SINGLE, Group
from metadiff_cli.core.encoders.image_encoder import ImageEncoder
from metadiff_cli.errors import DataError, MetaDiffError
from metadiff_cli.files import atomic, release, sweep, writable

Progress = Callable[[int, int], None]
BATCH, GPU_BATCH = 32, 256  # images per pass of the encoder
PIXELS = 300_000  # per pass on the CPU, where the maps of more take memory and save no time
SHARD = 2048  # images per file while a bank is made: an interruption loses the work on one file


class Bank:
    """Base of the banks: labels (n,) as positions in `classes`, or -1, and what a method is given of each image."""

    labels: np.ndarray
    classes: tuple[str, ...]

    @property
    def numbers_per_image(self) -> int:
        """How many numbers `take` gives per image."""
        raise AssertionError("a bank knows the size of its images")

    def take(self, rows: np.ndarray) -> Tensor:
        """What methods are given of the images in `rows` (...), as a tensor (..., ...)."""
        raise AssertionError("a bank defines what it gives")

    def relabelled(self, labels: np.ndarray, classes: tuple[str, ...]) -> Self:
        """The same images with other labels and classes."""
        raise AssertionError("a bank knows how to make another one")

    def class_indices(self) -> list[np.ndarray]:
        """For each class, the rows of its images."""
        order = np.argsort(self.labels, kind="stable")
        return np.split(order, np.searchsorted(self.labels[order], np.arange(len(self.classes))))[1:]

    def with_images(self, fewest: int) -> tuple[Self, tuple[str, ...]]:
        """The bank of the classes that have at least `fewest` images, and the names of the classes it leaves out.

        Rows keep their places; images of the classes that are left out have the label -1.
        """
        counts = [len(rows) for rows in self.class_indices()]
        kept = [c for c, count in enumerate(counts) if count >= fewest]
        if len(kept) == len(counts):
            return self, ()
        labels = np.full(len(counts) + 1, -1)  # the last one is that of the label -1
        labels[kept] = np.arange(len(kept))
        left_out = tuple(cls for cls, count in zip(self.classes, counts, strict=True) if count < fewest)
        return self.relabelled(labels[self.labels], tuple(self.classes[c] for c in kept)), left_out


@dataclass(frozen=True)
class FeatureBank(Bank):
    """Features (n, D) float32 of labelled images; they may be memory-mapped."""

    features: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]

    @property
    def numbers_per_image(self) -> int:
        """D."""
        return int(self.features.shape[1])

    def take(self, rows: np.ndarray) -> Tensor:
        """Features (..., D) of rows (...)."""
        return torch.from_numpy(self.features[rows])

    def relabelled(self, labels: np.ndarray, classes: tuple[str, ...]) -> Self:
        """The same images with other labels and classes."""
        return replace(self, labels=labels, classes=classes)

    def by_class(self) -> Iterator[Tensor]:
        """The features (n_c, D) of each class; one class is in memory at a time."""
        for rows in self.class_indices():
            yield self.take(rows)
            release(self.features)


@dataclass(frozen=True)
class PixelBank(Bank):
    """Pixels (n, S, S, 3) uint8 of labelled images, for methods that adapt an encoder; they may be memory-mapped."""

    pixels: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]

    @property
    def numbers_per_image(self) -> int:
        """S * S * 3."""
        return int(np.prod(self.pixels.shape[1:]))

    def take(self, rows: np.ndarray) -> Tensor:
        """Pixels (..., S, S, 3) uint8 of rows (...)."""
        return torch.from_numpy(self.pixels[rows])

    def relabelled(self, labels: np.ndarray, classes: tuple[str, ...]) -> Self:
        """The same images with other labels and classes."""
        return replace(self, labels=labels, classes=classes)


def every_other(bank: FeatureBank, first: int) -> FeatureBank:
    """Every second class of a bank, from class `first` (0 or 1) on."""
    rows = np.flatnonzero((bank.labels >= 0) & (bank.labels % 2 == first))
    return FeatureBank(bank.features[rows], bank.labels[rows] // 2, bank.classes[first::2])


class Encoding:
    """Turns pixels into features in passes of at most `batch` images.

    Without a `batch` it is BATCH on the CPU, or fewer where images are large (see PIXELS), and GPU_BATCH elsewhere. A
    pass that does not fit into the memory of the device is halved, and so are all passes after it.
    """

    def __init__(self, encoder: ImageEncoder, batch: int | None = None) -> None:
        few = max(1, min(BATCH, PIXELS // encoder.size**2))
        usual = few if encoder.device.type == "cpu" else GPU_BATCH
        self.encoder, self.batch = encoder, batch or usual

    @property
    def size(self) -> int:
        """The side of the images in pixels."""
        return self.encoder.size

    def __call__(self, pixels: np.ndarray) -> Tensor:
        """Features (n, D) of pixels (n, S, S, 3) uint8.

        Raises DataError if a feature is not finite, MetaDiffError if not even one image fits into memory.
        """
        parts: list[Tensor] = []
        start = 0
        while start < len(pixels):
            found = self._pass(pixels[start : start + self.batch])
            if found is None:
                self._halve()
            else:
                parts.append(found)
                start += len(found)
        z = torch.cat(parts)
        if not bool(torch.isfinite(z).all()):
            raise DataError("the encoder gives features that are not finite", hint="use another encoder")
        return z

    def _pass(self, pixels: np.ndarray) -> Tensor | None:
        """Features, or None if memory does not suffice. The error is dropped here, as it holds on to the memory."""
        try:
            return self.encoder.encode(torch.from_numpy(np.array(pixels)))
        except torch.OutOfMemoryError:
            return None

    def _halve(self) -> None:
        if self.batch == 1:
            raise MetaDiffError("one image does not fit into the memory of the device", hint="use --device cpu")
        self.batch = max(1, self.batch // 2)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def extract(encode: Encoding, images: np.ndarray, progress: Progress = lambda done, total: None) -> Iterator[Tensor]:
    """Features (B, D) of images (n, S, S, 3) uint8, batch after batch. Raises as `Encoding` does."""
    start = 0
    while start < len(images):
        features = encode(images[start : start + encode.batch])
        start += len(features)
        release(images)
        progress(start, len(images))
        yield features


def build_bank(
    encoder: ImageEncoder,
    images: np.ndarray,
    labels: np.ndarray,
    classes: tuple[str, ...],
    *,
    folder: Path,
    key: str,
    batch: int | None = None,
    progress: Progress = lambda done, total: None,
    note: Callable[[str], None] = lambda text: None,
    group: Group = SINGLE,
) -> FeatureBank:
    """The features of a data set: from `folder` if they are there, else computed and kept; a `group` shares the work.

    `key` identifies the images; together with the encoder's key it names the file. An interrupted extraction continues
    after its last shard. If `folder` cannot be written to, a temporary folder is used and `note` is told. Raises as
    `Encoding` does.
    """
    path, shape = folder / f"{encoder.key}-{key[:32]}.npy", (len(labels), encoder.feature_size)
    # no lock here: files appear whole, and the folder may be read-only
    if group.on_rank_zero(lambda: _open(path, shape) is None):
        place = group.on_rank_zero(lambda: writable(folder))
        if place != folder:
            note(f"{folder} cannot be written to: features are kept in {place}")
            path = place / path.name
        with FileLock(f"{path}.lock") if group.rank == 0 else nullcontext():
            if group.on_rank_zero(lambda: _open(path, shape) is None):  # perhaps another run was faster
                _fill(path, encoder, images, batch, progress, group)
    kept = _open(path, shape)
    if kept is None:
        raise _unseen(path)
    return FeatureBank(kept, np.asarray(labels), classes)


def _fill(
    path: Path, encoder: ImageEncoder, images: np.ndarray, batch: int | None, progress: Progress, group: Group
) -> None:
    """Write the features of all images into one file, by way of shards that are removed in the end."""
    parts = path.with_suffix(".parts")
    group.on_rank_zero(lambda: sweep(path.parent, path.name))
    shards = _make_shards(encoder, images, parts, batch, progress, group)
    group.barrier()

    def finish() -> None:
        with atomic(path) as temporary:
            _join(shards, temporary, (len(images), encoder.feature_size))
        shutil.rmtree(parts, ignore_errors=True)

    group.on_rank_zero(finish)


def _make_shards(
    encoder: ImageEncoder, images: np.ndarray, folder: Path, batch: int | None, progress: Progress, group: Group
) -> list[Path]:
    """Files with the features of SHARD images each; those that are there already are not made again."""
    encode, done = Encoding(encoder, batch), 0
    shards = [(start, folder / f"{start // SHARD:06d}.npy") for start in range(0, len(images), SHARD)]
    for start, path in group.shard(shards):
        pixels = images[start : start + SHARD]
        if _open(path, (len(pixels), encoder.feature_size)) is None:
            further = partial(_further, progress, group.world_size, done, len(images))
            shard = np.concatenate([z.cpu().numpy() for z in extract(encode, pixels, further)])
            with atomic(path) as temporary, temporary.open("wb") as file:
                np.save(file, shard)
        else:
            _further(progress, group.world_size, done, len(images), len(pixels), 0)
        done += len(pixels)
    return [path for _, path in shards]


def _further(progress: Progress, processes: int, before: int, total: int, done: int, _: int) -> None:
    """Report the progress of a shard as progress of the whole; the other processes are about as far."""
    progress(min(total, (before + done) * processes), total)


def _unseen(path: Path) -> MetaDiffError:
    """The error for a file that was just written and is not there."""
    return MetaDiffError(
        f"{path} was written by one process and cannot be read by another",
        hint="set METADIFF_CACHE_DIR to a folder on a file system that all machines share",
    )


def _join(shards: Sequence[Path], path: Path, shape: tuple[int, int]) -> None:
    """Write one array file from shards, in sequence: a memory-mapped one would end the process on a full disk."""
    with path.open("wb") as file:
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.float32)), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for shard in shards:
            if not shard.is_file():
                raise _unseen(shard)
            file.write(np.load(shard, allow_pickle=False).data)


def _open(path: Path, shape: tuple[int, int]) -> np.ndarray | None:
    """The features in a kept file, or None if it is missing or damaged (it is then made again)."""
    try:
        kept: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return kept if kept.shape == shape and kept.dtype == np.float32 else None
