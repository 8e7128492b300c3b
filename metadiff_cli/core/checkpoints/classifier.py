"""Adapted classifiers on disk: all that prediction needs, and all that it takes to adapt again with further images.

Beside the classifier's weights a file holds the whole model (encoder, task space, denoiser, tuning), and the features
and digests of the support images and of the unlabelled pool. It holds no pixels and no folders of the images.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from pydantic import ConfigDict
from torch import Tensor

from metadiff_cli.core.checkpoints.file import Checkpoint, Part, load_checkpoint, save_checkpoint
from metadiff_cli.core.checkpoints.model import (
    Model,
    Positive,
    SavedClassifier,
    checkpoint_errors,
    model_header,
    model_of,
    model_tensors,
)
from metadiff_cli.core.method.adapt import TaskClassifier
from metadiff_cli.core.method.task_space import TaskSpace

DIGEST = 32  # bytes


class ClassifierHeader(Part):
    """What is read from the header of a classifier, besides that of its model."""

    model_config = ConfigDict(extra="ignore")

    scale: Positive
    guidance: Positive
    support: list[str]


@dataclass(frozen=True)
class StoredImages:
    """Features (n, D) of n images, and the digest (32 bytes) of each image's pixels."""

    features: Tensor
    digests: tuple[bytes, ...]


@dataclass(frozen=True)
class StoredClassifier:
    """What a classifier file holds. `model` is what the classifier was adapted from.

    `labels` (n,) are the classes of the n support images, as positions in `classes`; `names` are shown in messages.
    `pool` holds the unlabelled images that guided the adaptation, where there were any.
    """

    model: Model
    task: TaskClassifier
    classes: tuple[str, ...]
    support: StoredImages
    labels: np.ndarray
    names: tuple[str, ...]
    pool: StoredImages | None = None

    @property
    def classifier(self) -> SavedClassifier:
        """The part that predicts."""
        return SavedClassifier(self.model.images, self.task, self.classes)


def save_classifier(path: Path, stored: StoredClassifier) -> None:
    """Write a classifier; the same classifier gives the same bytes. Raises OSError."""
    model, task = stored.model, stored.task
    tensors = model_tensors(model.images, model.metadiff) | {
        "weights": task.weights,
        "mean": task.space.mean.reshape(1, 1, -1),
        "support.labels": torch.from_numpy(stored.labels),
        **_image_tensors("support", stored.support),
    }
    if stored.pool is not None:
        tensors |= _image_tensors("pool", stored.pool)
    header = {
        "classes": list(stored.classes),
        "scale": task.scale,
        "guidance": task.single_guidance(),
        "denoiser": model.header["denoiser"],
        "support": list(stored.names),
        **model_header(model.images, model.metadiff),
    }
    save_checkpoint(path, "classifier", tensors, header)


def load_classifier(path: Path, device: torch.device) -> StoredClassifier:
    """Read a classifier. Raises CheckpointError for any other file, and for a damaged one."""
    checkpoint = load_checkpoint(path, "classifier")
    model = model_of(checkpoint, device)
    with checkpoint_errors(path):
        ClassifierHeader.of(checkpoint.header)
        classes, names = tuple(checkpoint.header["classes"]), tuple(checkpoint.header["support"])
        task = _task(checkpoint, model, len(classes))
        size = model.images.feature_size
        support, labels = _images(checkpoint, "support", size, device), checkpoint.tensors["support.labels"].numpy()
        if not len(labels) == len(names) == len(support.features):
            raise ValueError("the parts of its support differ in length")
        if not np.array_equal(np.unique(labels), np.arange(len(classes))):
            raise ValueError("the labels of its support are not its classes")
        pool = _images(checkpoint, "pool", size, device) if checkpoint.part("pool") else None
        return StoredClassifier(model, task, classes, support, labels, names, pool)


def _task(checkpoint: Checkpoint, model: Model, ways: int) -> TaskClassifier:
    weights, header = checkpoint.tensors["weights"].to(model.images.device), checkpoint.header
    if weights.shape[1:] != (1, ways, model.images.feature_size):
        raise ValueError(f"weights of shape {tuple(weights.shape)}")
    return TaskClassifier(_space(checkpoint, model), weights, float(header["guidance"]), float(header["scale"]))


def _space(checkpoint: Checkpoint, model: Model) -> TaskSpace:
    """The task space of the base classes, around the mean of this task."""
    mean = checkpoint.tensors["mean"]
    if mean.shape != (1, 1, model.images.feature_size):
        raise ValueError(f"a mean of shape {tuple(mean.shape)}")
    return model.metadiff.space.around(mean.to(model.images.device))


def _image_tensors(prefix: str, images: StoredImages) -> dict[str, Tensor]:
    digests = np.frombuffer(b"".join(images.digests), dtype=np.uint8).reshape(-1, DIGEST)  # (n, 32)
    return {f"{prefix}.features": images.features, f"{prefix}.digests": torch.from_numpy(digests.copy())}


def _images(checkpoint: Checkpoint, prefix: str, size: int, device: torch.device) -> StoredImages:
    features, digests = checkpoint.tensors[f"{prefix}.features"], checkpoint.tensors[f"{prefix}.digests"]
    if features.shape != (len(digests), size):
        raise ValueError(f"{prefix} features of shape {tuple(features.shape)}, not ({len(digests)}, {size})")
    if digests.shape != (len(digests), DIGEST) or digests.dtype != torch.uint8:
        raise ValueError(f"{prefix} digests of shape {tuple(digests.shape)} and type {digests.dtype}")
    return StoredImages(features.to(device), tuple(row.tobytes() for row in digests.numpy()))
