"""Estimate how well a support set tells its own classes apart: leave-one-out in closed form, without adapting again.

Each image of a class of two or more is compared with the weight of its own class, made without the image, and with the
weights of the other classes, each made without one image and averaged over that image. All weights then come from one
image less than there are, and the estimate comes closest to the accuracy with all images (measured on mini-ImageNet
validation classes with 2 to 10 images per class). A weight is the analytic posterior mean of its class.
`leave_one_out_guidance` chooses the guidance scale in the same way.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from metadiff_cli.core.method.adapt import TaskClassifier
from metadiff_cli.core.method.guidance import PROTOTYPE
from metadiff_cli.core.method.metric import blend
from metadiff_cli.core.method.support import TaskSupport
from metadiff_cli.core.method.task_space import TaskSpace

FEWEST_TO_SUSPECT = 3  # images per class: of two images that differ, nobody can tell which one is wrong
SUSPECT_ODDS = 20.0  # of another class against the image's own; 1 to 3 % of correctly labelled images exceed it


@dataclass(frozen=True)
class Suspect:
    """A support image that looks like another class than its own, with the probability of that class."""

    path: str
    label: str
    looks_like: str
    confidence: float


@dataclass(frozen=True)
class SupportCheck:
    """The estimated accuracy in percent: the mean over classes with two or more images, from `images` held-out images.

    `confused` lists pairs of classes with the number of images that were taken for the other class, most first.
    """

    images: int
    accuracy: float
    confused: tuple[tuple[str, str, int], ...]
    suspects: tuple[Suspect, ...]


def check_support(
    task: TaskClassifier, support: TaskSupport, classes: Sequence[str], paths: Sequence[str]
) -> SupportCheck | None:
    """Leave each support image out once. `classes` (N,) and `paths` (n,) are the names that the result shows.

    None when every class has one image.
    """
    labels, counts = support.labels.cpu(), support.count[:, 0].cpu().long()
    held_out = counts[labels] >= 2  # (n,)
    if not bool(held_out.any()):
        return None
    cosines = left_out_cosines(task.space.of_task(0), support, task.single_guidance()).cpu()
    probabilities = (task.scale * cosines).softmax(dim=1)
    predicted = probabilities.argmax(dim=1)
    right = predicted == labels
    per_class = [float(right[labels == c].float().mean()) for c in range(len(counts)) if counts[c] >= 2]
    found = _suspects(labels, probabilities, counts[labels] >= FEWEST_TO_SUSPECT)
    return SupportCheck(
        int(held_out.sum()),
        100 * sum(per_class) / len(per_class),
        _confused(classes, labels[held_out], predicted[held_out]),
        tuple(
            Suspect(paths[image], classes[label], classes[other], confidence)
            for image, label, other, confidence in found
        ),
    )


def left_out_cosines(space: TaskSpace, support: TaskSupport, guidance: float) -> Tensor:
    """Unscaled logits (n, N) of the n support images of one task; the weight of the own class is made without it."""
    z, labels = support.z[0], support.labels
    v = space.to_task(z)  # (n, D)
    count = support.count  # (N, 1)
    total = torch.zeros(len(count), v.shape[1], device=v.device).index_add_(0, labels, v)
    n = count[labels]  # (n, 1)
    fewer = (n - 1).clamp_min(1)
    rest = torch.where(n > 1, (total[labels] - v) / fewer, v)
    own = _weights(space, rest, fewer, guidance)  # (n, D): of the image's class, without the image
    whitened = _cosines(space.whiten(z), space.whiten(own), labels, count)
    return blend(whitened, _cosines(space.plain(z), space.plain(own), labels, count), guidance)


def _cosines(z: Tensor, own: Tensor, labels: Tensor, count: Tensor) -> Tensor:
    """Cosines (n, N) of z (n, D): to the weight in `own` (n, D) for its class, to the mean weight for the others."""
    z, own = F.normalize(z, dim=1), F.normalize(own, dim=1)
    others = torch.zeros(len(count), z.shape[1], device=z.device).index_add_(0, labels, own) / count
    return (z @ others.T).scatter(1, labels.unsqueeze(1), (z * own).sum(dim=1, keepdim=True))


def _weights(space: TaskSpace, mean: Tensor, count: Tensor, guidance: float) -> Tensor:
    """Posterior means (n, D), in feature space, of classes with `count` (n, 1) images and mean features `mean`."""
    if guidance >= PROTOTYPE:
        return space.to_feature(mean)
    evidence = count * guidance * space.precision
    return space.to_feature(evidence / (1 + evidence) * mean)


def _confused(classes: Sequence[str], labels: Tensor, predicted: Tensor) -> tuple[tuple[str, str, int], ...]:
    pairs: Counter[tuple[str, str]] = Counter()
    for label, other in zip(labels.tolist(), predicted.tolist(), strict=True):
        if label != other:
            first, second = sorted((label, other))
            pairs[classes[first], classes[second]] += 1
    ordered = sorted(pairs.items(), key=lambda item: (-item[1], item[0]))
    return tuple((first, second, number) for (first, second), number in ordered)


def _suspects(labels: Tensor, probabilities: Tensor, eligible: Tensor) -> list[tuple[int, int, int, float]]:
    """Image, its class, the class that it looks like, and the probability of that class; the clearest case first."""
    found = []
    for image in torch.nonzero(eligible).flatten().tolist():
        label, best = int(labels[image]), int(probabilities[image].argmax())
        own, other = float(probabilities[image, label]), float(probabilities[image, best])
        if other > SUSPECT_ODDS * own:
            found.append((own / other, (image, label, best, other)))
    return [suspect for _, suspect in sorted(found)]
