"""`adapt` for image files: a support set from a folder, a classifier from it, predictions as a stream."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from metadiff_cli.core.checkpoints.model import Model, SavedClassifier
from metadiff_cli.core.encoders.bank import Encoding
from metadiff_cli.core.encoders.image_encoder import ImageEncoder
from metadiff_cli.core.method.adapt import Sampling, adapt_tasks, seeds_of
from metadiff_cli.core.method.rejection import Rejector, rejector_of
from metadiff_cli.core.method.support import Example, Pool, SupportSet, digest_of, pool_of, require_classes, support_of
from metadiff_cli.data.cache import decode_images
from metadiff_cli.data.listing import open_labelled
from metadiff_cli.errors import DataError

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Encoded:
    """One image file: features (D,) and the digest of its pixels, or the reason why there are none."""

    path: str
    features: Tensor | None
    digest: bytes = b""
    reason: str = ""


@dataclass(frozen=True)
class Prediction:
    """Of one query image: probabilities (N,), or the reason why there are none; `twin` is a support image alike.

    `margin` is the known score above the threshold of rejection, in nats, where there is one; below 0 it is rejected.
    """

    path: str
    probabilities: list[float] | None
    reason: str = ""
    twin: str | None = None
    margin: float | None = None


def encode_images(
    paths: Sequence[str],
    images: ImageEncoder,
    batch: int,
    *,
    workers: int | None = None,
    progress: Progress = lambda done, total: None,
) -> Iterator[list[Encoded]]:
    """The files in order, a batch at a time: no more than one batch, and what is being decoded, is in memory."""
    encode = Encoding(images, batch)
    waiting: list[tuple[str, np.ndarray | str]] = []
    decoded = decode_images([Path(path) for path in paths], images.size, workers=workers)
    for i, (path, (_, pixels)) in enumerate(zip(paths, decoded, strict=True)):
        waiting.append((path, pixels))
        progress(i + 1, len(paths))
        if len(waiting) == batch:
            yield _encode_batch(waiting, encode)
            waiting = []
    if waiting:
        yield _encode_batch(waiting, encode)


def _encode_batch(waiting: list[tuple[str, np.ndarray | str]], encode: Encoding) -> list[Encoded]:
    arrays = [pixels for _, pixels in waiting if not isinstance(pixels, str)]
    features = iter(encode(np.stack(arrays))) if arrays else iter(())
    return [
        Encoded(path, None, reason=pixels)
        if isinstance(pixels, str)
        else Encoded(path, next(features), digest_of(pixels))
        for path, pixels in waiting
    ]


def read_support(
    source: Path,
    images: ImageEncoder,
    batch: int,
    *,
    workers: int | None = None,
    progress: Progress = lambda done, total: None,
) -> SupportSet:
    """Encode a folder of class folders, or a listing. Raises DataError, also when nothing of a class can be read."""
    split = open_labelled(source)
    examples: list[Example] = []
    broken: list[tuple[str, str]] = []
    reasons: dict[str, str] = {}  # by class, the first
    labels = iter(split.labels)
    for part in encode_images(split.paths, images, batch, workers=workers, progress=progress):
        for encoded in part:
            label = split.classes[next(labels)]
            if encoded.features is None:
                broken.append((encoded.path, encoded.reason))
                reasons.setdefault(label, encoded.reason)
            else:
                examples.append(Example(label, encoded.path, encoded.digest, encoded.features))
    alive = {example.label for example in examples}
    for cls in split.classes:
        if cls not in alive:
            raise DataError(
                f"none of the images of class '{cls}' can be read: the first is {reasons[cls]}",
                hint="replace them or remove the class",
            )
    return support_of(examples, broken)


def pool_from(encoded: Iterable[list[Encoded]]) -> Pool | None:
    """A pool of the images that could be read; None when there is none."""
    pairs = [(e.digest, e.features) for part in encoded for e in part if e.features is not None]
    return pool_of(pairs) if pairs else None


def adapt_classifier(
    model: Model, support: SupportSet, sampling: Sampling, *, seed: int, pool: Pool | None = None
) -> SavedClassifier:
    """Draw a classifier for a support set, guided by a pool where there is one. Raises DataError for one class only."""
    require_classes(support)
    order = torch.arange(len(support.classes)).unsqueeze(0)  # classes are sorted by name already
    pool = None if pool is None else pool.without(support.digests)
    task = adapt_tasks(
        model.metadiff, support.task(), sampling, ranks=order, seeds=seeds_of(seed, 0, 1),
        pool=None if pool is None else pool.features.unsqueeze(0),
    )  # fmt: skip
    return SavedClassifier(model.images, task, support.classes)


def classifier_rejector(model: Model, support: SupportSet, classifier: SavedClassifier) -> Rejector:
    """What rejects images of no class. Raises CheckpointError where no threshold was fitted."""
    return rejector_of(model.metadiff, classifier.task, support.task())


def predict_images(
    classifier: SavedClassifier,
    encoded: Iterable[list[Encoded]],
    known: Mapping[bytes, str],
    rejector: Rejector | None = None,
) -> Iterator[Prediction]:
    """Predictions in the order of the images; `known` are the paths of support images by digest."""
    for part in encoded:
        rows = iter(_predicted(classifier, [e.features for e in part if e.features is not None], rejector))
        for e in part:
            if e.features is None:
                yield Prediction(e.path, None, e.reason)
            else:
                probabilities, margin = next(rows)
                yield Prediction(e.path, probabilities, twin=known.get(e.digest), margin=margin)


def _predicted(
    classifier: SavedClassifier, features: list[Tensor], rejector: Rejector | None
) -> list[tuple[list[float], float | None]]:
    """Probabilities and margin of each of the features (D,)."""
    if not features:
        return []
    z = torch.stack(features)
    rows = classifier.probabilities(z).tolist()
    margins = [None] * len(rows) if rejector is None else rejector.margins(z.unsqueeze(0))[0].tolist()
    return list(zip(rows, margins, strict=True))
