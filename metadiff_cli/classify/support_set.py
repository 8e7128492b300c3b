"""The images that a classifier is made of: the labelled support and the unlabelled pool, each picture once.

Both are sorted by class and digest, so nothing depends on file names or on the order in which images are given.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from metadiff_cli.classify.images import Encoded, encode_images
from metadiff_cli.core.checkpoints.facts import NONE
from metadiff_cli.core.encoders.bank import Encoding
from metadiff_cli.core.encoders.image_encoder import ImageEncoder
from metadiff_cli.core.method.metric import Metric
from metadiff_cli.core.method.support import TaskSupport
from metadiff_cli.data.cache import Progress, no_progress
from metadiff_cli.data.folders import Split
from metadiff_cli.data.scan import class_name
from metadiff_cli.errors import DataError

FEWEST_CLASSES = 2
SHOWN = 5  # cases of one kind that a message names


@dataclass(frozen=True)
class SupportSet:
    """Features (n, D) of the support images, their labels (n,) as positions in `classes`, digests and paths.

    `broken` lists images that cannot be read, as path and reason. `repeated` lists images that are left out because
    the same picture is there already, as their path and the path of that picture.
    """

    classes: tuple[str, ...]
    features: Tensor
    labels: np.ndarray
    digests: tuple[bytes, ...]
    paths: tuple[str, ...]
    broken: tuple[tuple[str, str], ...] = ()
    repeated: tuple[tuple[str, str], ...] = ()

    def counts(self) -> dict[str, int]:
        """Images per class."""
        numbers = np.bincount(self.labels, minlength=len(self.classes))
        return {cls: int(n) for cls, n in zip(self.classes, numbers, strict=True)}

    def names(self) -> tuple[str, ...]:
        """Class and file name of each image, as a saved classifier keeps them."""
        paths = zip(self.labels, self.paths, strict=True)
        return tuple(f"{self.classes[label]}/{class_name(Path(path).name)}" for label, path in paths)

    def path_of(self) -> Mapping[bytes, str]:
        """The path of each picture, by its digest."""
        return dict(zip(self.digests, self.paths, strict=True))

    def task(self, metric: Metric) -> TaskSupport:
        """The support of one task (B = 1), with features expanded for a metric."""
        labels = torch.from_numpy(self.labels).to(self.features.device)
        return TaskSupport(metric.expand(self.features).unsqueeze(0), labels)

    def labelled(self) -> list[tuple[str, Encoded]]:
        """Class and image, one by one."""
        images = zip(self.paths, self.features, self.digests, strict=True)
        return [(self.classes[c], Encoded(*image)) for c, image in zip(self.labels, images, strict=True)]

    def joined(self, other: "SupportSet") -> "SupportSet":
        """Both together, as if all images had been given at once. Raises DataError as `support_of` does."""
        both = support_of([*self.labelled(), *other.labelled()])
        return replace(
            both,
            broken=(*self.broken, *other.broken),
            repeated=(*self.repeated, *other.repeated, *both.repeated),
        )


@dataclass(frozen=True)
class Pool:
    """Unlabelled images: features (P, D) and digests."""

    features: Tensor
    digests: tuple[bytes, ...]

    def joined(self, other: "Pool | None") -> "Pool":
        """Both together."""
        if other is None:
            return self
        pairs = [*zip(self.digests, self.features, strict=True), *zip(other.digests, other.features, strict=True)]
        return _pool(dict(pairs))

    def without(self, digests: Iterable[bytes]) -> "Pool | None":
        """The pool without these pictures: the class of a labelled image needs no guess. None when nothing is left."""
        left_out = set(digests)
        rows = [i for i, digest in enumerate(self.digests) if digest not in left_out]
        return Pool(self.features[rows], tuple(self.digests[i] for i in rows)) if rows else None


def pool_of(images: Iterable[Encoded]) -> Pool | None:
    """A pool of the images that can be read. None when there are none."""
    features = {image.digest: image.features for image in images if image.features is not None}
    return _pool(features) if features else None


def _pool(features: Mapping[bytes, Tensor]) -> Pool:
    digests = tuple(sorted(features))
    return Pool(torch.stack([features[digest] for digest in digests]), digests)


def read_support(
    split: Split,
    encoder: ImageEncoder,
    batch: int | None,
    *,
    workers: int | None = None,
    progress: Progress = no_progress,
) -> SupportSet:
    """Encode the images of a folder of class folders, or of a listing, as `open_labelled` finds them.

    `batch` is as for `Encoding`; `workers` and `progress` are as for `encode_images`. Raises DataError as `support_of`
    does.
    """
    labels = (split.classes[label] for label in split.labels)
    encoded = encode_images(split.paths, Encoding(encoder, batch), workers=workers, progress=progress)
    return support_of(zip(labels, chain.from_iterable(encoded), strict=True))


def support_of(labelled: Iterable[tuple[str, Encoded]]) -> SupportSet:
    """A support set from the class and the features of each image. A picture that is given twice counts once.

    Raises DataError when the same picture is in two classes, and when no image of a class can be read.
    """
    first: dict[bytes, tuple[str, Encoded]] = {}
    broken: list[tuple[str, Encoded]] = []
    repeated: list[tuple[str, str]] = []
    torn: list[str] = []
    for label, image in labelled:
        if image.features is None:
            broken.append((label, image))
            continue
        known, twin = first.setdefault(image.digest, (label, image))
        if known != label:
            torn.append(f"{twin.path} ('{known}') and {image.path} ('{label}')")
        elif twin is not image:
            repeated.append((image.path, twin.path))
    _require_images(broken, {label for label, _ in first.values()})
    if torn:
        more = f"; and {len(torn) - SHOWN} more" if len(torn) > SHOWN else ""
        raise DataError(
            f"the same picture is in two classes: {'; '.join(torn[:SHOWN])}{more}",
            hint="keep it in the class that it shows",
        )
    ordered = sorted(first.values(), key=lambda pair: (pair[0], pair[1].digest))
    classes = tuple(sorted({label for label, _ in ordered}))
    position = {cls: i for i, cls in enumerate(classes)}
    return SupportSet(
        classes,
        torch.stack([image.features for _, image in ordered if image.features is not None]),
        np.array([position[label] for label, _ in ordered]),
        tuple(image.digest for _, image in ordered),
        tuple(image.path for _, image in ordered),
        tuple((image.path, image.reason) for _, image in broken),
        tuple(repeated),
    )


def _require_images(broken: Iterable[tuple[str, Encoded]], readable: set[str]) -> None:
    """Raise DataError for a class whose images are all broken."""
    for label, image in broken:
        if label not in readable:
            raise DataError(
                f"none of the images of class '{label}' can be read; the first is {image.path}: {image.reason}",
                hint="replace the images, or remove the class",
            )


def require_classes(support: SupportSet) -> None:
    """Raise DataError when there are too few classes to tell apart."""
    if support.classes == (NONE,):
        raise DataError("the support has no class, only images of none", hint="add a folder of images for each class")
    if len(support.classes) < FEWEST_CLASSES:
        raise DataError(
            f"the support has one class only, '{support.classes[0]}'",
            hint=f"add a folder for each further class, or a folder {NONE} of images that show something else",
        )
