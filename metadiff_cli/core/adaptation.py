"""`adapt` for image files: a support set from a folder, a classifier from it, predictions as a stream."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from metadiff_cli.core.features import ImageEncoder
from metadiff_cli.core.inference import Sampling, adapt_tasks, seeds_of
from metadiff_cli.core.model import Model, SavedClassifier
from metadiff_cli.data.cache import decode_images
from metadiff_cli.data.folders import scan_classes
from metadiff_cli.errors import DataError

FEWEST_CLASSES = 2


@dataclass(frozen=True)
class SupportSet:
    """Features (n, D) of the support images that could be read, their labels, and hashes of their pixels."""

    classes: tuple[str, ...]
    features: Tensor
    labels: np.ndarray
    digests: Mapping[bytes, str]
    broken: tuple[tuple[str, str], ...]

    def counts(self) -> dict[str, int]:
        """Images per class."""
        numbers = np.bincount(self.labels, minlength=len(self.classes))
        return {cls: int(n) for cls, n in zip(self.classes, numbers, strict=True)}

    def padded(self) -> tuple[Tensor, Tensor]:
        """Features (1, N, K, D), K the largest class, and which of them are real (1, N, K)."""
        counts = list(self.counts().values())
        z = self.features.new_zeros(1, len(counts), max(counts), self.features.shape[1])
        valid = torch.zeros(z.shape[:3], dtype=torch.bool, device=z.device)
        for label, count in enumerate(counts):
            z[0, label, :count] = self.features[torch.from_numpy(self.labels == label)]
            valid[0, label, :count] = True
        return z, valid


@dataclass(frozen=True)
class Prediction:
    """Of one query image: probabilities (N,), or the reason why there are none; `twin` is a support image alike."""

    path: str
    probabilities: list[float] | None
    reason: str = ""
    twin: str | None = None


def read_support(folder: Path, images: ImageEncoder, *, workers: int | None = None) -> SupportSet:
    """Encode a folder of class folders. Raises DataError for fewer than two classes or a class that cannot be read."""
    split = scan_classes(folder)
    if len(split.classes) < FEWEST_CLASSES:
        raise DataError(f"{folder} has one class, '{split.classes[0]}'", hint="add a folder for each further class")
    pixels, labels, digests, broken = [], [], {}, []
    files = [Path(path) for path in split.paths]
    for (path, decoded), label in zip(decode_images(files, images.size, workers=workers), split.labels, strict=True):
        if isinstance(decoded, str):
            broken.append((str(path), decoded))
            continue
        pixels.append(decoded)
        labels.append(label)
        digests[_digest(decoded)] = str(path)
    for label, cls in enumerate(split.classes):
        if label not in labels:
            raise DataError(f"none of the images of class '{cls}' can be read", hint="replace them or remove the class")
    parts = [images.encode(torch.from_numpy(np.stack(pixels[i : i + 64]))) for i in range(0, len(pixels), 64)]
    return SupportSet(split.classes, torch.cat(parts), np.array(labels), digests, tuple(broken))


def read_images(
    paths: Sequence[Path],
    images: ImageEncoder,
    batch: int,
    *,
    workers: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Tensor:
    """Features (n, D) of the files that can be read."""
    parts = []
    for i, (_, features) in enumerate(_encoded(paths, images, batch, workers)):
        if isinstance(features, Tensor):
            parts.append(features)
        progress(i + 1, len(paths))
    if not parts:
        raise DataError("none of the unlabelled images can be read", hint="give other images, or leave the option out")
    return torch.stack(parts)


def adapt_classifier(
    model: Model, support: SupportSet, sampling: Sampling, *, seed: int, pool: Tensor | None = None
) -> SavedClassifier:
    """Draw a classifier for a support set; `pool` (P, D) are unlabelled images that guide it."""
    z, valid = support.padded()
    order = torch.arange(len(support.classes)).unsqueeze(0)  # classes are sorted by name already
    task = adapt_tasks(
        model.learner, z, sampling, ranks=order, seeds=seeds_of(seed, 0, 1), valid=valid,
        pool=None if pool is None else pool.unsqueeze(0),
    )  # fmt: skip
    return SavedClassifier(model.images, task, support.classes)


def predict_images(
    classifier: SavedClassifier,
    paths: Sequence[Path],
    batch: int,
    known: Mapping[bytes, str],
    *,
    workers: int | None = None,
) -> Iterator[Prediction]:
    """Predictions in the order of `paths`, a batch in memory at a time; `known` are hashes of support images."""
    for (path, digest), features in _encoded(paths, classifier.images, batch, workers):
        if isinstance(features, str):
            yield Prediction(str(path), None, features)
            continue
        p = classifier.probabilities(features.view(1, -1))
        yield Prediction(str(path), [float(x) for x in p.flatten()], twin=known.get(digest))


def _encoded(
    paths: Sequence[Path], images: ImageEncoder, batch: int, workers: int | None
) -> Iterator[tuple[tuple[Path, bytes], Tensor | str]]:
    """((path, hash of the pixels), features (D,) or the reason why there are none), in order."""
    waiting: list[tuple[Path, np.ndarray | str]] = []
    for item in decode_images(paths, images.size, workers=workers):
        waiting.append(item)
        if len(waiting) == batch:
            yield from _encode_batch(waiting, images)
            waiting = []
    yield from _encode_batch(waiting, images)


def _encode_batch(
    waiting: list[tuple[Path, np.ndarray | str]], images: ImageEncoder
) -> Iterator[tuple[tuple[Path, bytes], Tensor | str]]:
    arrays = [decoded for _, decoded in waiting if not isinstance(decoded, str)]
    features = iter(images.encode(torch.from_numpy(np.stack(arrays)))) if arrays else iter(())
    for path, decoded in waiting:
        if isinstance(decoded, str):
            yield (path, b""), decoded
        else:
            yield (path, _digest(decoded)), next(features)


def _digest(pixels: np.ndarray) -> bytes:
    """Hash of an image as the encoder sees it: the same picture in another format may still differ."""
    return hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).digest()
