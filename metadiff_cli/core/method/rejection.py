"""Rejection: images that show none of the classes of a task.

The known score of an image is the log odds that it shows one of the task's classes rather than a class of the world,
for which the base classes stand: log mean_n exp(T s w_n phi) - log mean_c exp(T s b_c phi), in nats. Without base
classes the second term is missing. Among the scores that were tried, it separates known from unknown images best
(docs/experiments.md).

Its level moves with the world that the images are from, so the threshold is relative to the task. It is the mean score
of the support images, each scored by a classifier that was made without it, plus an offset that was fitted on
validation classes (`fit_rejection` in training/fit.py). An image that is alone in its class is scored against the other
classes, where it is unknown: such scores are of another kind and have offsets of their own.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from metadiff_cli.core.method.adapt import MetaDiff, TaskClassifier
from metadiff_cli.core.method.calibration import Rejection
from metadiff_cli.core.method.held_out import HeldOut, holdable
from metadiff_cli.core.method.support import TaskSupport
from metadiff_cli.errors import CheckpointError, DataError

RATE = 0.05  # of images of the task's own classes, on the classes of the fit, that are rejected
MOST_BASE = 256  # base classes that stand for the world; more cost time and say the same
TWO = 2  # images of a class from which on one can be held out


@dataclass(frozen=True)
class Rejector:
    """Rejects images of B tasks: weights of base classes (B, C, J), and the threshold (B,) of the known score."""

    classifier: TaskClassifier
    base: Tensor | None
    threshold: Tensor

    @torch.inference_mode()
    def margins(self, x: Tensor) -> Tensor:
        """Return the known score minus the threshold (B, Q) of expanded features x (B, Q, J); below 0: rejected."""
        return known_scores(self.classifier, self.base, x) - self.threshold.view(-1, 1)


@torch.inference_mode()
def rejector_of(
    metadiff: MetaDiff, classifier: TaskClassifier, support: TaskSupport, *, known: Sequence[int] | None = None
) -> Rejector:
    """Return the rejector for classifiers that `metadiff` made of expanded support features (B, n, J).

    `known` are the positions of the N' classes whose images are known, None for all. The others, such as a class of
    things that are no class, are in the classifier and in no score. Raises CheckpointError when the checkpoint has no
    fitted threshold, and DataError for a single known class of one image, which nothing can be scored against.
    """
    table, support = require_rejection(metadiff).offsets, holdable(support)
    known = range(support.ways) if known is None else known
    rows, ways = torch.tensor(known, device=support.labels.device), len(known)
    counts = support.counts[rows]
    if ways == 1 and int(counts) < TWO:
        raise DataError("a threshold of rejection needs two images of a single class", hint="add an image of the class")
    base = base_weights(metadiff, classifier)
    scores, alone = support_scores(classifier, support, base, rows)
    per_class = scores @ (support.one_hot()[:, rows] / counts)  # (B, N'): each class counts the same
    shots = max(float(counts.sum()) / ways, TWO)
    offsets = torch.where(alone[rows], table.at(ways, 1), table.at(ways, shots))  # (N',)
    own = replace(classifier, weights=classifier.weights[:, :, rows])
    return Rejector(own, base, per_class.mean(dim=1) + offsets.to(scores).mean())


def require_rejection(metadiff: MetaDiff) -> Rejection:
    """Return the fitted table. Raises CheckpointError when there is none."""
    if metadiff.tuning.rejection is None:
        raise CheckpointError(
            "this checkpoint has no threshold for rejection: it was made without validation classes",
            hint="make one with validation classes by `metadiff metatrain`, or use --reject-below",
        )
    return metadiff.tuning.rejection


def base_weights(metadiff: MetaDiff, classifier: TaskClassifier) -> Tensor | None:
    """Return the weights (B, C, J) of base classes in the metric of each task; evenly chosen where there are many."""
    if metadiff.targets is None:
        return None
    step = math.ceil(len(metadiff.targets) / MOST_BASE)
    return classifier.embed(metadiff.metric.expand(metadiff.targets[::step]).unsqueeze(0))


def known_scores(classifier: TaskClassifier, base: Tensor | None, x: Tensor) -> Tensor:
    """Return the known scores (B, Q) of x (B, Q, J), averaged over the samples inside the logarithm."""
    own = [_log_mean_exp(classifier.logits(x, m)) for m in range(len(classifier.weights))]
    return _log_mean_exp(torch.stack(own, dim=-1)) - _base_scores(classifier, base, x)


def support_scores(
    classifier: TaskClassifier, support: TaskSupport, base: Tensor | None, known: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the known scores (B, n) of the support as if each image were not in it, and which classes (N,) are alone.

    Scores are of the classes at the positions `known` (N',), None for all. An image of a class of one is scored against
    the other ones alone.
    """
    target, alone = support.one_hot(), support.counts < TWO
    logits = classifier.logits(support.x)  # for the images of classes of one
    if bool((~alone).any()):
        held = HeldOut(classifier.metric, support)
        found = classifier.settings.temperature.view(-1, 1, 1) * held.logits(classifier.settings)
        logits = torch.where(held.folds.left_out.view(1, -1, 1), found, logits)
    silent = (target.bool() & alone).unsqueeze(0)  # (1, n, N): entries that say nothing
    if known is not None:
        silent = silent | torch.ones_like(alone).index_fill(0, known, 0)
    ways = (~silent).sum(dim=-1).to(logits)  # classes that count for each image
    scores = logits.masked_fill(silent, -torch.inf).logsumexp(dim=-1) - ways.log()
    return scores - _base_scores(classifier, base, support.x), alone


def _base_scores(classifier: TaskClassifier, base: Tensor | None, x: Tensor) -> Tensor:
    """Log mean exp of the logits of the base classes, (B, Q) of x (B, Q, J)."""
    return x.new_zeros(x.shape[:2]) if base is None else _log_mean_exp(classifier.logits_of(base, x))


def _log_mean_exp(values: Tensor) -> Tensor:
    """Over the last dimension."""
    return values.logsumexp(dim=-1) - math.log(values.shape[-1])
