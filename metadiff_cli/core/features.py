"""FeatureBank: a frozen encoder over a data set, once, kept on disk.

Images -> z (n, D): L2-normalised, averaged with the mirror image's, normalised again. Everything after this stage
works on features, so an episode costs an index and no forward pass.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from metadiff_cli.core.encoders import Encoder
from metadiff_cli.data.transforms import normalise
from metadiff_cli.errors import DataError
from metadiff_cli.paths import atomic

Progress = Callable[[int, int], None]
VERSION = 1  # of the computation below: part of the key, so that old files are not taken for new ones


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

    @property
    def feature_size(self) -> int:
        """D."""
        return self.encoder.feature_size(self.size)

    @property
    def key(self) -> str:
        """Hash of the weights and of everything else that features depend on."""
        digest = hashlib.sha256(repr((VERSION, self.name, self.size, self.mean, self.std, self.mirror)).encode())
        for name, tensor in sorted(self.encoder.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:32]

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> Tensor:
        """Features (B, D), unit length, of pixels (B, S, S, 3) uint8."""
        self.encoder.eval()
        mean, std = (torch.tensor(v, device=self.device) for v in (self.mean, self.std))
        images = normalise(pixels.to(self.device), mean, std)
        z = F.normalize(self.encoder(images), dim=1)
        if self.mirror:
            z = F.normalize(z + F.normalize(self.encoder(images.flip(3)), dim=1), dim=1)
        return z


@dataclass(frozen=True)
class FeatureBank:
    """Features (n, D) of labelled images; `features` may be memory-mapped."""

    features: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]

    def class_indices(self) -> list[np.ndarray]:
        """For each class, the rows of its images."""
        order = np.argsort(self.labels, kind="stable")
        return np.split(order, np.searchsorted(self.labels[order], np.arange(1, len(self.classes))))

    def tensor(self, device: torch.device) -> Tensor:
        """All features (n, D) on a device."""
        return torch.from_numpy(np.array(self.features)).to(device)


def every_other(bank: FeatureBank, first: int) -> FeatureBank:
    """Every second class of a bank, from class `first` (0 or 1) on."""
    chosen = np.flatnonzero(bank.labels % 2 == first)
    return FeatureBank(bank.features[chosen], bank.labels[chosen] // 2, bank.classes[first::2])


def extract(
    encoder: ImageEncoder, images: np.ndarray, batch: int, progress: Progress = lambda done, total: None
) -> Iterator[Tensor]:
    """Features (B, D) of images (n, S, S, 3) uint8, batch after batch."""
    for start in range(0, len(images), batch):
        features = encoder.encode(torch.from_numpy(np.array(images[start : start + batch])))
        progress(min(start + batch, len(images)), len(images))
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
    progress: Progress = lambda done, total: None,
) -> FeatureBank:
    """The features of a data set, from `folder` when they are there, else computed and kept.

    `key` names the images; together with the encoder's key it names the file. Raises DataError when the encoder gives
    features that are not finite.
    """
    path = folder / f"{encoder.key}-{key[:32]}.npy"
    shape = (len(labels), encoder.feature_size)
    kept = _open(path, shape)
    if kept is None:
        with atomic(path) as temporary:
            out = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float32, shape=shape)
            start = 0
            for part in extract(encoder, images, batch, progress):
                if not bool(torch.isfinite(part).all()):
                    raise DataError("the encoder gives features that are not finite", hint="use another encoder")
                out[start : start + len(part)] = part.cpu().numpy()
                start += len(part)
            out.flush()
            del out
        kept = np.load(path, mmap_mode="r", allow_pickle=False)
    return FeatureBank(kept, np.asarray(labels), classes)


def _open(path: Path, shape: tuple[int, int]) -> np.ndarray | None:
    """The kept file, or None when it is missing or damaged (it is then made again)."""
    try:
        kept: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return kept if kept.shape == shape and kept.dtype == np.float32 else None
