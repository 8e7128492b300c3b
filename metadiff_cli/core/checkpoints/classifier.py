"""Classifiers on disk: all that prediction needs, and all that it takes to make the classifier again with more images.

Beside the weights a file holds the model (encoder, task space, denoiser, tuning), features and digests of the support,
and of the pool that guided it. No pixels are kept, and of paths only class and file name.
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
from metadiff_cli.core.method.support import Pool, SupportSet
from metadiff_cli.core.method.task_space import TaskSpace
from metadiff_cli.data.scan import class_name

DIGEST = 32  # bytes


class ClassifierHeader(Part):
    """What is read from the header of a classifier, besides that of its model."""

    model_config = ConfigDict(extra="ignore")

    scale: Positive
    guidance: Positive
    support: list[str]


@dataclass(frozen=True)
class Origin:
    """What a classifier was made of."""

    model: Model
    support: SupportSet
    pool: Pool | None = None


def save_classifier(path: Path, classifier: SavedClassifier, origin: Origin) -> None:
    """Write an adapted classifier with what it was made of."""
    support, pool, metadiff = origin.support, origin.pool, origin.model.metadiff
    tensors = model_tensors(classifier.images, metadiff)
    tensors |= {
        "weights": classifier.task.weights,
        "mean": classifier.task.space.mean.reshape(1, 1, -1),
        "support.features": support.features,
        "support.labels": torch.from_numpy(support.labels),
        "support.digests": _bytes_tensor(support.digests),
    }
    if pool is not None:
        tensors |= {"pool.features": pool.features, "pool.digests": _bytes_tensor(pool.digests)}
    header = {
        "classes": list(classifier.classes),
        "scale": classifier.task.scale,
        "guidance": classifier.task.single_guidance(),
        "denoiser": origin.model.header["denoiser"],
        "support": [
            f"{classifier.classes[c]}/{class_name(Path(p).name)}"
            for c, p in zip(support.labels, support.paths, strict=True)
        ],
        **model_header(classifier.images, metadiff),
    }
    save_checkpoint(path, "classifier", tensors, header)


def load_classifier(path: Path, device: torch.device) -> tuple[SavedClassifier, Origin]:
    """Read an adapted classifier and what it was made of. Raises CheckpointError for anything else."""
    checkpoint = load_checkpoint(path, "classifier")
    model = model_of(checkpoint, device)
    header = checkpoint.header
    with checkpoint_errors(path):
        ClassifierHeader.of(header)
        weights = checkpoint.tensors["weights"].to(device)
        if weights.shape[1:] != (1, len(header["classes"]), model.images.feature_size):
            raise ValueError(f"weights of shape {tuple(weights.shape)}")
        task = TaskClassifier(_space(checkpoint, model), weights, float(header["guidance"]), float(header["scale"]))
        classifier = SavedClassifier(model.images, task, tuple(header["classes"]))
        return classifier, Origin(model, _support(checkpoint, device), _pool(checkpoint, device))


def _space(checkpoint: Checkpoint, model: Model) -> TaskSpace:
    """The task's own; files from before there was one have that of the base classes."""
    mean = checkpoint.tensors.get("mean")
    if mean is None:
        return model.metadiff.space
    if mean.shape != (1, 1, model.images.feature_size):
        raise ValueError(f"a mean of shape {tuple(mean.shape)}")
    return model.metadiff.space.around(mean.to(model.images.device))


def _support(checkpoint: Checkpoint, device: torch.device) -> SupportSet:
    part = checkpoint.part("support")
    labels = part["labels"].numpy()
    classes, paths, digests = tuple(checkpoint.header["classes"]), checkpoint.header["support"], _digests(part)
    if not len(labels) == len(paths) == len(digests) == len(part["features"]):
        raise ValueError("the support's parts differ in length")
    if part["features"].shape[1:] != checkpoint.tensors["weights"].shape[-1:]:
        raise ValueError("the support's features are of another encoder")
    if not np.array_equal(np.unique(labels), np.arange(len(classes))):
        raise ValueError("the support's labels are not those of its classes")
    return SupportSet(classes, part["features"].to(device), labels, digests, tuple(paths))


def _pool(checkpoint: Checkpoint, device: torch.device) -> Pool | None:
    part = checkpoint.part("pool")
    return Pool(part["features"].to(device), _digests(part)) if part else None


def _bytes_tensor(digests: tuple[bytes, ...]) -> Tensor:
    """(n, 32) uint8."""
    return torch.from_numpy(np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(-1, DIGEST).copy())


def _digests(part: dict[str, Tensor]) -> tuple[bytes, ...]:
    return tuple(row.tobytes() for row in part["digests"].numpy())
