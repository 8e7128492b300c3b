"""How well a support set can tell its own classes apart: leave-one-out, in closed form, nothing is adapted anew.

Each image of a class with two or more meets the weight of its own class made without it, and the other classes' weights
made without one of theirs, averaged over which: all classes are then given equally much, and the estimate comes nearest
to the accuracy with all images (measured on mini-ImageNet validation classes, 2 to 10 images a class). Weights are the
analytic posterior means (design, section 2); `leave_one_out_guidance` chooses the guidance scale in the same way.
"""

from collections import Counter
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from metadiff_cli.core.method.adapt import TaskClassifier
from metadiff_cli.core.method.guidance import PROTOTYPE
from metadiff_cli.core.method.metric import blend
from metadiff_cli.core.method.support import SupportSet
from metadiff_cli.core.method.task_space import TaskSpace

FEWEST_TO_SUSPECT = 3  # images of a class: of two that differ, nobody can tell which one is wrong
SUSPECT_ODDS = 20.0  # another class against the own one; 1 to 3 % of rightly labelled mini-ImageNet images exceed it


@dataclass(frozen=True)
class Suspect:
    """A support image that looks like another class than its own, and the probability of that class."""

    path: str
    label: str
    looks_like: str
    confidence: float


@dataclass(frozen=True)
class SupportCheck:
    """Estimated accuracy in percent from `images` held-out images, mean over the classes with two or more.

    `confused` are pairs of classes and the number of images taken for one another, most first.
    """

    images: int
    accuracy: float
    confused: tuple[tuple[str, str, int], ...]
    suspects: tuple[Suspect, ...]


def check_support(task: TaskClassifier, support: SupportSet) -> SupportCheck | None:
    """Leave-one-out over a support set, as adaptation took it. None for one image a class."""
    counts = torch.bincount(torch.from_numpy(support.labels), minlength=len(support.classes))
    labels = torch.from_numpy(support.labels)
    held_out = counts[labels] >= 2  # (n,)
    if not bool(held_out.any()):
        return None
    cosines = left_out_cosines(task.space.of_task(0), support, task.single_guidance()).cpu()
    probabilities = (task.scale * cosines).softmax(dim=1)
    predicted = probabilities.argmax(dim=1)
    right = predicted == labels
    per_class = [float(right[labels == c].float().mean()) for c in range(len(counts)) if counts[c] >= 2]
    return SupportCheck(
        int(held_out.sum()),
        100 * sum(per_class) / len(per_class),
        _confused(support, predicted, held_out),
        _suspects(support, probabilities, counts[labels] >= FEWEST_TO_SUSPECT),
    )


def left_out_cosines(space: TaskSpace, support: SupportSet, guidance: float) -> Tensor:
    """Unscaled logits (n, N) of the support images, for the own class from its weight as made without the image."""
    z, labels = support.features, torch.from_numpy(support.labels).to(support.features.device)
    v = space.to_task(z)  # (n, D)
    count = torch.bincount(labels, minlength=len(support.classes)).unsqueeze(1).to(v)  # (N, 1)
    total = torch.zeros(len(count), v.shape[1], device=v.device).index_add_(0, labels, v)
    n = count[labels]  # (n, 1)
    fewer = (n - 1).clamp_min(1)
    rest = torch.where(n > 1, (total[labels] - v) / fewer, v)
    own = _weights(space, rest, fewer, guidance)  # (n, D) of its class without the image
    whitened = _cosines(space.whiten(z), space.whiten(own), labels, count)
    return blend(whitened, _cosines(space.plain(z), space.plain(own), labels, count), guidance)


def _cosines(z: Tensor, own: Tensor, labels: Tensor, count: Tensor) -> Tensor:
    """Cosines (n, N) of z (n, D) to the weight `own` (n, D) of its class, and the mean over each other class."""
    z, own = F.normalize(z, dim=1), F.normalize(own, dim=1)
    others = torch.zeros(len(count), z.shape[1], device=z.device).index_add_(0, labels, own) / count
    return (z @ others.T).scatter(1, labels.unsqueeze(1), (z * own).sum(dim=1, keepdim=True))


def _weights(space: TaskSpace, mean: Tensor, count: Tensor, guidance: float) -> Tensor:
    """Posterior means (n, D) in feature space of classes with `count` (n, 1) images of the mean (n, D)."""
    if guidance >= PROTOTYPE:
        return space.to_feature(mean)
    evidence = count * guidance * space.precision
    return space.to_feature(evidence / (1 + evidence) * mean)


def _confused(support: SupportSet, predicted: Tensor, held_out: Tensor) -> tuple[tuple[str, str, int], ...]:
    pairs: Counter[tuple[str, str]] = Counter()
    for label, other, counts in zip(support.labels.tolist(), predicted.tolist(), held_out.tolist(), strict=True):
        if counts and label != other:
            first, second = sorted((label, other))
            pairs[support.classes[first], support.classes[second]] += 1
    ordered = sorted(pairs.items(), key=lambda item: (-item[1], item[0]))
    return tuple((first, second, number) for (first, second), number in ordered)


def _suspects(support: SupportSet, probabilities: Tensor, eligible: Tensor) -> tuple[Suspect, ...]:
    """Most conspicuous first."""
    found = []
    for row in torch.nonzero(eligible).flatten().tolist():
        label, best = int(support.labels[row]), int(probabilities[row].argmax())
        own, other = float(probabilities[row, label]), float(probabilities[row, best])
        if other > SUSPECT_ODDS * own:
            suspect = Suspect(support.paths[row], support.classes[label], support.classes[best], other)
            found.append((own / other, suspect))
    return tuple(suspect for _, suspect in sorted(found, key=lambda pair: (pair[0], pair[1].path)))
