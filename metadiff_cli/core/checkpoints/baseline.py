"""Trained baselines on disk: the learned start of the inner loop and, on frozen features, the model beside it."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from metadiff_cli.config.schema import FrozenBaseline, ImageBaseline
from metadiff_cli.core.baselines.learners import (
    ON_FEATURES,
    ON_IMAGES,
    FrozenLearner,
    InnerLearner,
    build_image_learner,
)
from metadiff_cli.core.checkpoints.file import Checkpoint, load_checkpoint, save_checkpoint
from metadiff_cli.core.checkpoints.headers import MetricHeader, TuningHeader
from metadiff_cli.core.checkpoints.model import (
    checkpoint_errors,
    described_encoder,
    image_encoder,
    image_header,
    metric_of,
    model_header,
    model_tensors,
)
from metadiff_cli.core.encoders.image_encoder import ImageEncoder
from metadiff_cli.core.encoders.networks import build_encoder
from metadiff_cli.core.method.adapt import MetaDiff

HEAD_BIAS = {"maml": "net.1.bias", "fomaml": "net.1.bias"}  # of the others: head.bias


@dataclass(frozen=True)
class Baseline:
    """A gradient-based baseline called `name`, with the learner `inner` and the header of its file.

    `images` says how an image is read; a baseline on images shares its encoder with `inner`. A baseline on frozen
    features has in `base` the analytic model of the same features, from which the controls are made; else it is None.
    """

    name: str
    images: ImageEncoder
    inner: InnerLearner
    base: MetaDiff | None
    header: dict[str, Any]


def save_baseline(path: Path, method: Baseline, metrics: dict[str, Any]) -> None:
    """Write a trained baseline."""
    tensors = {f"inner.{n}": t for n, t in method.inner.state_dict().items()}
    header = {**method.header, "metrics": metrics, **image_header(method.images)}
    if method.base is not None:
        tensors |= model_tensors(method.images, method.base)
        header |= model_header(method.images, method.base)
    save_checkpoint(path, "baseline", tensors, header)


def load_baseline(path: Path, device: torch.device) -> Baseline:
    """Read a trained baseline. Raises CheckpointError when the file holds anything else."""
    checkpoint = load_checkpoint(path, "baseline")
    with checkpoint_errors(path):
        name = str(checkpoint.header["baseline"]["name"])
        if name not in (*ON_FEATURES, *ON_IMAGES):
            raise ValueError(f"a method called {name!r:.40}")
        images, inner, base = (_on_features if name in ON_FEATURES else _on_images)(name, checkpoint, device)
        inner.load_state_dict(checkpoint.part("inner"))
        return Baseline(name, images, inner.to(device).eval(), base, checkpoint.header)


def _on_features(
    name: str, checkpoint: Checkpoint, device: torch.device
) -> tuple[ImageEncoder, InnerLearner, MetaDiff | None]:
    header = checkpoint.header
    images = image_encoder(checkpoint, device)
    metric = metric_of(checkpoint, MetricHeader.of(header["metric"]), images)
    base = MetaDiff(metric, tuning=TuningHeader.of(header["tuning"]).tuning())
    centre = torch.zeros(images.feature_size) if metric.space is None else metric.space.mean
    settings = FrozenBaseline.model_validate(header["baseline"]["settings"])
    return images, FrozenLearner(name, _way(name, checkpoint), centre, settings), base


def _on_images(
    name: str, checkpoint: Checkpoint, device: torch.device
) -> tuple[ImageEncoder, InnerLearner, MetaDiff | None]:
    header = checkpoint.header
    images = described_encoder(header, build_encoder(header["encoder"]), device)
    settings = ImageBaseline.model_validate(header["baseline"]["settings"])
    shape = (images.size, images.mean, images.std)
    inner = build_image_learner(name, _way(name, checkpoint), partial(build_encoder, images.name), *shape, settings)
    return replace(images, encoder=inner.backbone), inner, None


def _way(name: str, checkpoint: Checkpoint) -> int:
    """The number of ways, checked against the tensors before anything of that size is made."""
    bias = checkpoint.tensors[f"inner.{HEAD_BIAS.get(name, 'head.bias')}"]
    way, found = checkpoint.header["baseline"]["way"], len(bias)
    if way != found:
        raise ValueError(f"{way!r:.40} ways, and a head of {found}")
    return found
