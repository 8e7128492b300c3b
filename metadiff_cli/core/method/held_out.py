"""Held-out logits: each support image under a classifier that was made without it.

In fold f some images of every class are left out, at least one of each class that has two or more, and the inner
problem of the rest is solved again. The rest makes the domain, the starting weights and the descent; no left-out image
has a part in any of them. There are at most FOLDS folds, so a class of that many images or fewer loses one at a time.

Everything of a fold follows from the Gram matrices of the parts of the support, which are computed once: the domain and
the class means are weighted sums of images. One call serves every use of held-out logits: the choice of the metric, the
temperature of the confidences, the estimate of the accuracy, images that look mislabelled, and rejection.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from metadiff_cli.core.method.descent import Gram, InnerProblem
from metadiff_cli.core.method.metric import SHORTEST, Metric
from metadiff_cli.core.method.support import TaskSupport

FOLDS, FEW_FOLDS = 5, 2  # the second for a support of more than MANY images
MANY = 1000
STEPS = 6  # of descent: the logits of six are those of the minimum to two digits
AT_ONCE = 20_000_000  # entries of the Gram matrices of folds that are in memory at once


@dataclass(frozen=True)
class Folds:
    """Which images are left out: `keep` (F, n) is 0 for an image that fold f leaves out, else 1.

    `fold` (n,) is the fold that leaves an image out, or -1 for the only image of a class.
    """

    keep: Tensor
    fold: Tensor

    @classmethod
    def of(cls, labels: Tensor) -> "Folds":
        """Return the folds of images with these labels (n,)."""
        counts = torch.bincount(labels)
        order = torch.argsort(labels, stable=True)
        first = torch.cumsum(counts, 0) - counts
        place = torch.empty_like(labels)
        place[order] = torch.arange(len(labels), device=labels.device) - first[labels[order]]  # of an image in its class
        number = min(int(counts.max()), FOLDS if len(labels) <= MANY else FEW_FOLDS)
        fold = torch.where(counts[labels] > 1, place % max(number, 1), -1)
        return cls((fold.unsqueeze(0) != torch.arange(number, device=labels.device).unsqueeze(1)).float(), fold)

    @property
    def left_out(self) -> Tensor:
        """Which images (n,) are left out by some fold."""
        return self.fold >= 0


class HeldOut:
    """The held-out logits of B tasks with expanded support features x (B, n, J), for any hyper-parameters."""

    def __init__(self, metric: Metric, support: TaskSupport) -> None:
        self.metric, self.support = metric, support
        self.folds = Folds.of(support.labels)
        self.moved = support.x - metric.origin.to(support.x.device)

    def logits(
        self, shares: Tensor, guidance: Tensor, domain: float, scale: float, prior: float
    ) -> Tensor:
        """Return s W phi (B, n, N) of each image in the fold that leaves it out.

        `shares` (B, G) are those of the groups of features, `guidance` (B,) is a, `domain` the share of the task's
        mean in its domain, `scale` s and `prior` rho. The row of an image that no fold leaves out is zero.
        """
        tasks, count = self.moved.shape[:2]
        target = self.support.one_hot()
        found = self.moved.new_zeros(tasks, count, target.shape[1])
        weights = self.metric.weights(shares, guidance)
        at_once = max(1, AT_ONCE // (tasks * count**2))
        for keep in torch.split(self.folds.keep, at_once):
            gram, start = self._problem(keep, weights, guidance, domain)
            problem = InnerProblem(
                Gram(gram.flatten(0, 1)), start.flatten(0, 1), target, scale, prior, keep.repeat(tasks, 1)
            )
            logits = problem.logits(problem.descend(STEPS)).view(tasks, len(keep), count, -1)
            found += ((1 - keep).view(1, len(keep), count, 1) * logits).sum(dim=1)
        return found

    def _problem(self, keep: Tensor, weights: Tensor, guidance: Tensor, domain: float) -> tuple[Tensor, Tensor]:
        """G (B, F, n, n) and Phi W_0' (B, F, n, N) of the folds `keep` (F, n)."""
        target = self.support.one_hot()
        classes = keep.unsqueeze(1) * target.T  # (F, N, n): coefficients of the class means
        classes = classes / classes.sum(dim=-1, keepdim=True)
        middle = domain * classes.mean(dim=1)  # (F, n): of the domain
        gram, start = self.moved.new_zeros(()), self.moved.new_zeros(())
        for part, weight in enumerate(weights.unbind(dim=1)):
            g, s = _centred(*self._grams(part, guidance), classes, middle)
            gram, start = gram + weight.view(-1, 1, 1, 1) * g, start + weight.view(-1, 1, 1, 1) * s
        return gram, start

    def _grams(self, part: int, guidance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """X X', X S X' and X S^2 X' (B, n, n) of a part, where S is what the posterior mean shrinks a class mean by."""
        plain = len(self.metric.groups) if self.metric.plain else 0
        if part < plain or self.metric.space is None:
            return self._plain[part], self._plain[part], self._plain[part]
        x, precision = (self._parts[part], torch.split(self.metric.space.precision, self.metric.groups)[part - plain])
        rest = self.support.shots * (1 - 1 / len(self.folds.keep))  # images per class that a fold leaves
        evidence = max(rest, 1.0) * guidance.view(-1, 1, 1) * precision  # (B, 1, D_g)
        shrunk = x * (evidence / (1 + evidence))
        return self._plain[part], x @ shrunk.mT, shrunk @ shrunk.mT

    @cached_property
    def _parts(self) -> list[Tensor]:
        return list(self.metric.split(self.moved))

    @cached_property
    def _plain(self) -> list[Tensor]:
        return [x @ x.mT for x in self._parts]


def _centred(
    products: Tensor, shrunk: Tensor, twice: Tensor, classes: Tensor, middle: Tensor
) -> tuple[Tensor, Tensor]:
    """Cosines of images (B, F, n, n), and of images and starting weights (B, F, n, N), relative to the domain.

    `products`, `shrunk` and `twice` (B, n, n) are X X', X S X' and X S^2 X'; `classes` (F, N, n) and `middle` (F, n)
    are the coefficients of class means and domain.
    """
    to_middle = products @ middle.T  # (B, n, F)
    across, square = to_middle.mT, (middle.T * to_middle).sum(dim=1)  # (B, F, n), (B, F)
    lengths = (
        (products.diagonal(dim1=1, dim2=2).unsqueeze(1) - 2 * across + square.unsqueeze(-1)).clamp_min(0).sqrt()
    ).clamp_min(SHORTEST)
    gram = products.unsqueeze(1) - across.unsqueeze(-1) - across.unsqueeze(-2) + square[..., None, None]
    moved = classes - middle.unsqueeze(1)  # (F, N, n)
    to_weights = torch.einsum("bij,fcj->bfic", shrunk, moved)
    inner = to_weights - torch.einsum("fi,bfic->bfc", middle, to_weights).unsqueeze(2)
    sizes = torch.einsum("fci,bij,fcj->bfc", moved, twice, moved).clamp_min(0).sqrt().clamp_min(SHORTEST)
    return (
        gram / (lengths.unsqueeze(-1) * lengths.unsqueeze(-2)),
        inner / (lengths.unsqueeze(-1) * sizes.unsqueeze(-2)),
    )
