"""Adapted classifiers on disk: all that prediction needs, and all that it takes to adapt again with further images.

Beside the classifier's weights a file holds the whole model (encoder, metric, denoiser, tuning), and the features
and digests of the support images and of the unlabelled pool. It holds no pixels and no folders of the images.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from pydantic import ConfigDict, Field
from torch import Tensor

from metadiff_cli.core.checkpoints.facts import known
from metadiff_cli.core.checkpoints.file import Checkpoint, Part, load_checkpoint, save_checkpoint
from metadiff_cli.core.checkpoints.headers import Positive
from metadiff_cli.core.checkpoints.model import (
    Model,
    SavedClassifier,
    check_tensor,
    checkpoint_errors,
    model_header,
    model_of,
    model_tensors,
)
from metadiff_cli.core.method.adapt import TaskClassifier
from metadiff_cli.core.method.metric import TaskSettings
from metadiff_cli.core.method.rejection import Rejector, rejector_of
from metadiff_cli.core.method.support import TaskSupport

DIGEST = 32  # bytes


class SettingsHeader(Part):
    """`settings`: the hyper-parameters of the task, as `TaskSettings` has them."""

    guidance: Positive
    level: Annotated[float, Field(ge=0, le=1)]
    domain: Annotated[float, Field(ge=0, le=1)]
    temperature: Positive
    scale: Positive
    prior: Positive

    def settings(self, device: torch.device) -> TaskSettings:
        """Those of one task."""
        tensors = {
            name: torch.tensor([getattr(self, name)], device=device)
            for name in ("guidance", "level", "domain", "temperature")
        }
        return TaskSettings(**tensors, scale=self.scale, prior=self.prior)


class ClassifierHeader(Part):
    """What is read from the header of a classifier, besides that of its model."""

    model_config = ConfigDict(extra="ignore")

    settings: SettingsHeader
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

    def rejector(self) -> Rejector | None:
        """The rejector of images that show none of the classes; None where no threshold was fitted."""
        if self.model.metadiff.tuning.rejection is None:
            return None
        x, labels = self.task.metric.expand(self.support.features), torch.from_numpy(self.labels)
        support = TaskSupport(x.unsqueeze(0), labels.to(x.device))
        return rejector_of(self.model.metadiff, self.task, support, known=known(self.classes))


def save_classifier(path: Path, stored: StoredClassifier) -> None:
    """Write a classifier; the same classifier gives the same bytes. Raises OSError."""
    model, task = stored.model, stored.task
    tensors = model_tensors(model.images, model.metadiff) | {
        "weights": task.weights,
        "domain": task.domain,
        "support.labels": torch.from_numpy(stored.labels),
        **_image_tensors("support", stored.support),
    }
    if stored.pool is not None:
        tensors |= _image_tensors("pool", stored.pool)
    header = {
        "classes": list(stored.classes),
        "settings": settings_header(task.settings),
        "denoiser": model.header["denoiser"],
        "controls": model.header.get("controls", {}),
        "support": list(stored.names),
        **model_header(model.images, model.metadiff),
    }
    save_checkpoint(path, "classifier", tensors, header)


def load_classifier(path: Path, device: torch.device) -> StoredClassifier:
    """Read a classifier. Raises CheckpointError for any other file, and for a damaged one."""
    checkpoint = load_checkpoint(path, "classifier")
    model = model_of(checkpoint, device)
    with checkpoint_errors(path):
        header = ClassifierHeader.of(checkpoint.header)
        classes, names = tuple(checkpoint.header["classes"]), tuple(checkpoint.header["support"])
        task = _task(checkpoint, model, header, len(classes))
        size = model.images.feature_size
        support, labels = _images(checkpoint, "support", size, device), checkpoint.tensors["support.labels"].numpy()
        if not len(labels) == len(names) == len(support.features):
            raise ValueError("the parts of its support differ in length")
        if not np.array_equal(np.unique(labels), np.arange(len(classes))):
            raise ValueError("the labels of its support are not its classes")
        pool = _images(checkpoint, "pool", size, device) if checkpoint.part("pool") else None
        return StoredClassifier(model, task, classes, support, labels, names, pool)


def settings_header(settings: TaskSettings) -> dict[str, float]:
    """The hyper-parameters of one task as numbers, by name."""
    return {name: float(value) for name, value in vars(settings).items()}


def _task(checkpoint: Checkpoint, model: Model, header: ClassifierHeader, ways: int) -> TaskClassifier:
    metric, device = model.metadiff.metric, model.images.device
    weights, domain = checkpoint.tensors["weights"], checkpoint.tensors["domain"]
    size = sum(metric.parts)
    check_tensor("weights", weights, (len(weights), 1, ways, size))
    check_tensor("domain", domain, (1, 1, size))
    return TaskClassifier(metric, header.settings.settings(device), domain.to(device), weights.to(device))


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
