"""Knowing what a task does not know: images that belong to none of its classes.

The known score of an image is the log odds that it shows one of the task's classes rather than a class of the world,
for which the base classes stand: log mean_n exp(s cos(z, w_n)) - log mean_c exp(s cos(z, base_c)), in nats. Among the
scores that were tried it tells known from unknown images best (docs/experiments.md).

Its level moves with the world that the images are from, so the threshold is relative to the task: the support images
are scored as if they were not in the support, and to that an offset is added that was fitted on validation classes.
An image of a class with two or more is scored against its class made without it; an image that is alone in its class
against the other classes only, where it is an unknown one; so offsets of one shot are of another kind, and added apart.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from metadiff_cli.core.method.adapt import MetaDiff, TaskClassifier
from metadiff_cli.core.method.calibration import Rejection
from metadiff_cli.core.method.guidance import left_out_means
from metadiff_cli.core.method.metric import blend, task_logits
from metadiff_cli.core.method.support import TaskSupport
from metadiff_cli.errors import CheckpointError

RATE = 0.05  # of images of the task's own classes, on the classes of the fit, that are rejected
MOST_BASE = 256  # base classes that stand for the world; more cost time and say the same
LEAVE_ONE_OUT = 2  # images of a class from which on one can be left out


@dataclass(frozen=True)
class Rejector:
    """Of B tasks: their classifiers, base classes (C, D) in feature space, the threshold (B,) of the known score."""

    classifier: TaskClassifier
    base: Tensor
    threshold: Tensor

    @torch.inference_mode()
    def margins(self, z: Tensor) -> Tensor:
        """Known score minus threshold, (B, Q), of features z (B, Q, D); below 0 an image is rejected."""
        return known_scores(self.classifier, self.base, z) - self.threshold.view(-1, 1)


@torch.inference_mode()
def rejector_of(metadiff: MetaDiff, classifier: TaskClassifier, support: Tensor | TaskSupport) -> Rejector:
    """For classifiers that `metadiff` made of support features (B, N, K, D), or of a `TaskSupport` where shots differ.

    Raises CheckpointError when the metadiff's checkpoint has no fitted threshold.
    """
    table = require_rejection(metadiff).offsets
    if isinstance(support, Tensor):
        support = TaskSupport.even(support)
    alone = support.count.squeeze(1) < LEAVE_ONE_OUT  # (N,)
    if table.shots[-1] < LEAVE_ONE_OUT:
        alone = torch.ones_like(alone)
    base, way = base_classes(metadiff), len(support.count)
    shot = max(float(support.count.mean()), LEAVE_ONE_OUT)
    threshold = torch.where(alone, table.at(way, 1), table.at(way, shot)).mean()
    for part in support.parts():
        scores = left_out_scores(classifier, base, part, alone)
        threshold = threshold + (scores / (support.count[part.labels, 0] * way)).sum(
            dim=1
        )  # each class counts the same
    return Rejector(classifier, base, threshold)


def require_rejection(metadiff: MetaDiff) -> Rejection:
    """The fitted table. Raises CheckpointError when there is none."""
    if metadiff.tuning.rejection is None or metadiff.targets is None:
        raise CheckpointError(
            "this checkpoint has no threshold for rejection: it was trained without validation classes",
            hint="train with validation classes, or use --reject-below",
        )
    return metadiff.tuning.rejection


def base_classes(metadiff: MetaDiff) -> Tensor:
    """Weights (C, D) of base classes in feature space, evenly chosen where there are many."""
    assert metadiff.targets is not None
    step = math.ceil(len(metadiff.targets) / MOST_BASE)
    return metadiff.space.to_feature(metadiff.targets[::step])


def known_scores(classifier: TaskClassifier, base: Tensor, z: Tensor) -> Tensor:
    """(B, Q) of features z (B, Q, D), averaged over the samples inside the logarithm."""
    squares = classifier.space.squares(z)
    own = [_log_mean_exp(classifier.scale * classifier.logits(z, m, squares)) for m in range(len(classifier.weights))]
    return _log_mean_exp(torch.stack(own, dim=-1)) - _base_scores(classifier, base, z, squares)


def left_out_scores(classifier: TaskClassifier, base: Tensor, support: TaskSupport, alone: Tensor) -> Tensor:
    """Known scores (B, n) of the support as if each image were not in it.

    Classes that are `alone` (N,) are left out altogether for their own images, the others keep what is left: the
    analytic posterior mean of their other images.
    """
    z, labels, ways = support.z, support.labels, len(support.count)
    squares = classifier.space.squares(z)
    index = labels.view(1, -1, 1).expand(len(z), -1, 1)
    own = _own_cosines(classifier, support).masked_fill(alone[labels], -torch.inf).unsqueeze(-1)
    # a class left out altogether counts neither in the sum nor in the number of classes
    fewer = torch.where(alone[labels], math.log(ways / (ways - 1)), 0.0)
    each = [
        _log_mean_exp(classifier.scale * classifier.logits(z, m, squares).scatter(2, index, own)) + fewer
        for m in range(len(classifier.weights))
    ]
    return _log_mean_exp(torch.stack(each, dim=-1)) - _base_scores(classifier, base, z, squares)


def _own_cosines(classifier: TaskClassifier, support: TaskSupport) -> Tensor:
    """Logits (B, n) of the support's images for their own class made without them."""
    space, a, z = classifier.space, classifier.guidance, support.z
    without = left_out_means(space.to_task(z), space.to_task(support.means), support)
    scale = a.view(-1, 1, 1) if isinstance(a, Tensor) else a
    evidence = (support.count[support.labels] - 1) * scale * space.precision
    own = space.to_feature(evidence / (1 + evidence) * without)
    whitened = F.cosine_similarity(space.whiten(z), space.whiten(own), dim=-1).unsqueeze(-1)
    return blend(whitened, F.cosine_similarity(space.plain(z), space.plain(own), dim=-1).unsqueeze(-1), a).squeeze(-1)


def _base_scores(classifier: TaskClassifier, base: Tensor, z: Tensor, squares: Tensor) -> Tensor:
    """log mean exp of the logits of the base classes, (B, Q) of features z (B, Q, D) with `squares` (B, Q)."""
    c = classifier
    return _log_mean_exp(task_logits(z, base.unsqueeze(0), c.space, c.guidance, c.scale, squares))


def _log_mean_exp(values: Tensor) -> Tensor:
    """Over the last dimension."""
    return values.logsumexp(dim=-1) - math.log(values.shape[-1])
