"""FeatureBank: a frozen encoder over a data set, once, kept on disk.

Images -> z (n, D): L2-normalised, averaged over an image's views (its mirror image, images moved by some pixels),
normalised again. Everything after this stage works on features, so an episode costs an index and no forward pass.
"""

import hashlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock
from torch import Tensor

from metadiff_cli.core.device import sent
from metadiff_cli.core.encoders.networks import Encoder
from metadiff_cli.core.training.distributed import SINGLE, Group
from metadiff_cli.core.training.transforms import normalise
from metadiff_cli.data.mapped import release
from metadiff_cli.errors import ConfigError, DataError, MetaDiffError
from metadiff_cli.files import atomic, sweep, writable

Progress = Callable[[int, int], None]
VERSION = 1  # of the computation below: part of the key, so that old files are not taken for new ones
SHARD = 2048  # images whose features make a file while a bank is made: no more is lost when that is interrupted
# bf16 as the integers of its bits: NumPy knows no such type
STORES: dict[str, type[np.generic]] = {"fp32": np.float32, "fp16": np.float16, "bf16": np.int16}


@dataclass(frozen=True)
class ImageEncoder:
    """A frozen encoder with all that turns pixels into features: image size, normalisation, views."""

    encoder: Encoder
    name: str
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    mirror: bool
    device: torch.device
    shift: int = 0  # pixels; else eight images more, moved by so much to the sides and corners

    def __post_init__(self) -> None:
        if self.shift >= self.size:
            raise ConfigError(
                f"images of {self.size} pixels cannot be moved by {self.shift}", hint="--set features.shift=3, say"
            )

    @property
    def feature_size(self) -> int:
        """D."""
        return self.encoder.feature_size(self.size)

    @property
    def key(self) -> str:
        """Hash of the weights and of everything else that features depend on."""
        digest = hashlib.sha256(repr((VERSION, self.name, self.size, self.mean, self.std, self.mirror)).encode())
        if self.shift:
            digest.update(f"shift {self.shift}".encode())
        for name, tensor in sorted(self.encoder.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:32]

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> Tensor:
        """Features (B, D), unit length, of pixels (B, S, S, 3) uint8."""
        self.encoder.eval()
        return self.traceable(pixels)

    def traceable(self, pixels: Tensor) -> Tensor:
        """The computation of `encode` alone, as the exporter can follow it."""
        mean, std = (sent(torch.tensor(v), self.device) for v in (self.mean, self.std))
        images = normalise(sent(pixels, self.device), mean, std)
        z = [F.normalize(self.encoder(view), dim=1) for view in self._views(images)]
        return z[0] if len(z) == 1 else F.normalize(torch.stack(z).sum(dim=0), dim=1)

    def _views(self, images: Tensor) -> Iterator[Tensor]:
        """Views (B, 3, S, S) of images; what a moved image uncovers repeats its edge."""
        step, side = self.shift, images.shape[-1]
        corners = list(product((0, step, 2 * step), repeat=2)) if step else [(0, 0)]
        padded = F.pad(images, (step,) * 4, mode="replicate") if step else images
        for y, x in corners:
            view = padded[:, :, y : y + side, x : x + side]
            yield view
            if self.mirror:
                yield view.flip(3)


@dataclass(frozen=True)
class FeatureBank:
    """Features (n, D) of labelled images; `features` may be memory-mapped, in one of the types of STORES.

    In the place of features there may be pixels (n, S * S * 3) uint8.
    """

    features: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]

    def class_indices(self) -> list[np.ndarray]:
        """For each class, the rows of its images."""
        order = np.argsort(self.labels, kind="stable")
        return np.split(order, np.searchsorted(self.labels[order], np.arange(1, len(self.classes))))

    def take(self, rows: np.ndarray) -> Tensor:
        """Features (..., D) in float32 of rows (...); pixels stay uint8."""
        found = torch.from_numpy(self.features[rows])
        if found.dtype == torch.int16:
            found = found.view(torch.bfloat16)
        return found if found.dtype == torch.uint8 else found.float()

    def by_class(self) -> Iterator[Tensor]:
        """The features (n_c, D) of each class; one class is in memory at a time."""
        for rows in self.class_indices():
            yield self.take(rows)
            release(self.features)


def every_other(bank: FeatureBank, first: int) -> FeatureBank:
    """Every second class of a bank, from class `first` (0 or 1) on."""
    chosen = np.flatnonzero(bank.labels % 2 == first)
    return FeatureBank(bank.features[chosen], bank.labels[chosen] // 2, bank.classes[first::2])


class Encoding:
    """Pixels to features in passes of at most `batch` images.

    A pass that does not fit into the device's memory is halved, and so are all after it.
    """

    def __init__(self, encoder: ImageEncoder, batch: int) -> None:
        self.encoder, self.batch = encoder, batch

    def __call__(self, pixels: np.ndarray) -> Tensor:
        """Features (n, D) of pixels (n, S, S, 3) uint8.

        Raises DataError for features that are not finite, MetaDiffError when a single image does not fit.
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
        """None where memory does not suffice; the failed pass is forgotten here, as its error holds on to it."""
        try:
            return self.encoder.encode(torch.from_numpy(np.array(pixels)))
        except torch.OutOfMemoryError:
            return None

    def _halve(self) -> None:
        if self.batch == 1:
            raise MetaDiffError("one image does not fit into the device's memory", hint="use --device cpu")
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
    batch: int,
    store: str = "fp32",
    progress: Progress = lambda done, total: None,
    note: Callable[[str], None] = lambda text: None,
    group: Group = SINGLE,
) -> FeatureBank:
    """The features of a data set, from `folder` when they are there, else computed and kept as `store` (of STORES).

    `key` names the images; together with the encoder's key it names the file. Features are kept in shards on the way,
    and an interrupted extraction goes on after the last one. A folder that cannot be written to is replaced by a
    temporary one, which `note` is told. Raises as `Encoding` does.
    """
    name = f"{encoder.key}-{key[:32]}" + ("" if store == "fp32" else f"-{store}")
    path, shape, dtype = folder / f"{name}.npy", (len(labels), encoder.feature_size), np.dtype(STORES[store])
    if group.on_rank_zero(
        lambda: _open(path, shape, dtype) is None
    ):  # no lock: files appear whole, the folder may be read-only
        place = group.on_rank_zero(lambda: writable(folder))
        if place != folder:
            note(f"{folder} cannot be written to: features are kept in {place}")
            path = place / path.name
        with FileLock(f"{path}.lock") if group.rank == 0 else nullcontext():
            if group.on_rank_zero(lambda: _open(path, shape, dtype) is None):  # perhaps another run was faster
                _fill(path, encoder, images, batch, dtype, progress, group)
    kept = _open(path, shape, dtype)
    if kept is None:
        raise _unseen(path)
    return FeatureBank(kept, np.asarray(labels), classes)


def _fill(
    path: Path, encoder: ImageEncoder, images: np.ndarray, batch: int, dtype: np.dtype, progress: Progress, group: Group
) -> None:
    """The features of all images into one file, by way of shards that are removed in the end."""
    parts = path.with_suffix(".parts")
    group.on_rank_zero(lambda: sweep(path.parent, path.name))
    shards = _make_shards(encoder, images, parts, batch, dtype, progress, group)
    group.barrier()

    def finish() -> None:
        with atomic(path) as temporary:
            _join(shards, temporary, (len(images), encoder.feature_size), dtype)
        shutil.rmtree(parts, ignore_errors=True)

    group.on_rank_zero(finish)


def _make_shards(
    encoder: ImageEncoder, images: np.ndarray, folder: Path, batch: int, dtype: np.dtype, progress: Progress,
    group: Group,
) -> list[Path]:  # fmt: skip
    """Files with the features of SHARD images after another; those that are there already are not made again.

    Several processes share them out.
    """
    encode, done = Encoding(encoder, batch), 0
    shards = [(start, folder / f"{start // SHARD:06d}.npy") for start in range(0, len(images), SHARD)]
    for start, path in group.shard(shards):
        pixels = images[start : start + SHARD]
        if _open(path, (len(pixels), encoder.feature_size), dtype) is None:
            further = partial(_further, progress, group.world_size, done, len(images))
            shard = np.concatenate([_stored(z, dtype) for z in extract(encode, pixels, further)])
            with atomic(path) as temporary, temporary.open("wb") as file:
                np.save(file, shard)
        else:
            _further(progress, group.world_size, done, len(images), len(pixels), 0)
        done += len(pixels)
    return [path for _, path in shards]


def _further(progress: Progress, processes: int, before: int, total: int, done: int, _: int) -> None:
    """Progress of a shard as progress of the whole; the other processes are about as far."""
    progress(min(total, (before + done) * processes), total)


def _unseen(path: Path) -> MetaDiffError:
    """Why a file that was just written is not there."""
    return MetaDiffError(
        f"{path} was written by one process and cannot be read by another",
        hint="set METADIFF_CACHE_DIR to a folder on a file system that all machines share",
    )


def _join(shards: Sequence[Path], path: Path, shape: tuple[int, int], dtype: np.dtype) -> None:
    """One array file from shards, written in sequence: a memory-mapped one would end the process on a full disk."""
    with path.open("wb") as file:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for shard in shards:
            if not shard.is_file():
                raise _unseen(shard)
            file.write(np.load(shard, allow_pickle=False).data)


def _stored(features: Tensor, dtype: np.dtype) -> np.ndarray:
    """Features in the type that is kept."""
    if dtype == np.int16:
        return features.to(torch.bfloat16).view(torch.int16).cpu().numpy()
    return features.cpu().numpy().astype(dtype, copy=False)


def _open(path: Path, shape: tuple[int, int], dtype: np.dtype) -> np.ndarray | None:
    """The kept file, or None when it is missing or damaged (it is then made again)."""
    try:
        kept: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return kept if kept.shape == shape and kept.dtype == dtype else None
