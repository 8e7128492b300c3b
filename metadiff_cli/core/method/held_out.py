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
import torch.nn.functional as F
from torch import Tensor

from metadiff_cli.core.method.descent import Gram, InnerProblem
from metadiff_cli.core.method.metric import SHORTEST, Metric, TaskSettings
from metadiff_cli.core.method.support import TaskSupport

FOLDS, FEW_FOLDS = 5, 2  # the second for a support of more than MANY images
MANY = 1000
STEPS = 6  # of descent: the logits of six are those of the minimum to two digits
AT_ONCE = 20_000_000  # entries of the Gram matrices of folds that are in memory at once


@dataclass(frozen=True)
class Folds:
    """Which images are left out. `keep` (F, n) is 1 for an image that makes the classifier of fold f, else 0.

    `fold` (n,) is the fold that scores an image, or -1 if none does, as for the only image of a class.
    """

    keep: Tensor
    fold: Tensor

    @classmethod
    def of(cls, labels: Tensor) -> "Folds":
        """Return folds of support images with these labels (n,)."""
        counts = torch.bincount(labels)
        order = torch.argsort(labels, stable=True)
        first = torch.cumsum(counts, 0) - counts
        place = torch.empty_like(labels)
        place[order] = (
            torch.arange(len(labels), device=labels.device) - first[labels[order]]
        )  # of an image in its class
        number = min(int(counts.max()), FOLDS if len(labels) <= MANY else FEW_FOLDS)
        fold = torch.where(counts[labels] > 1, place % max(number, 1), -1)
        return cls((fold.unsqueeze(0) != torch.arange(number, device=labels.device).unsqueeze(1)).float(), fold)

    @classmethod
    def apart(cls, query: Tensor) -> "Folds":
        """Return the one fold of a support and its queries, which are where `query` (n,) is true."""
        return cls((~query).float().unsqueeze(0), torch.where(query, 0, -1))

    @property
    def left_out(self) -> Tensor:
        """Which images (n,) are scored."""
        return self.fold >= 0


class HeldOut:
    """The held-out logits of B tasks with expanded features x (B, n, J), for any hyper-parameters."""

    def __init__(self, metric: Metric, support: TaskSupport, folds: Folds | None = None) -> None:
        """`folds` None are those of the support, `Folds.of`."""
        self.metric, self.support = metric, support
        self.folds = Folds.of(support.labels) if folds is None else folds
        self.rows = self.folds.keep.any(dim=0).nonzero().squeeze(1)  # (m,): images that make classifiers
        self.keep = self.folds.keep[:, self.rows]  # (F, m)
        self.target = support.one_hot()[self.rows]  # (m, N)
        self.moved = support.x - metric.origin
        self._shrunk: dict[int, tuple[Tensor, tuple[Tensor, Tensor]]] = {}  # by part: for the last guidance asked for

    def logits(self, settings: TaskSettings) -> Tensor:
        """Return s W phi (B, n, N) of each image in the fold that leaves it out, zeros for an image that none does."""
        tasks, count = self.moved.shape[:2]
        found = self.moved.new_zeros(tasks, count, self.target.shape[1])
        at_once = max(1, AT_ONCE // (tasks * count * len(self.rows)))
        for first in range(0, len(self.keep), at_once):
            keep = self.keep[first : first + at_once]
            gram, start = self._problem(keep, settings)
            problem = InnerProblem(
                Gram(gram[:, :, self.rows].flatten(0, 1)), start[:, :, self.rows].flatten(0, 1), self.target,
                settings.scale, settings.prior, keep.repeat(tasks, 1),
            )  # fmt: skip
            dual = problem.descend(STEPS).view(tasks, len(keep), len(self.rows), -1)
            logits = settings.scale * start + settings.scale**2 * (gram @ dual)
            here = self.folds.fold == torch.arange(first, first + len(keep), device=keep.device).unsqueeze(1)  # (F, n)
            found += (here.unsqueeze(-1) * logits).sum(dim=1)
        return found

    def loss(self, settings: TaskSettings) -> Tensor:
        """Return the cross-entropy (B,) in nats, summed over the images that are left out."""
        logits = settings.temperature.view(-1, 1, 1) * self.logits(settings)
        losses = -(self.support.one_hot() * F.log_softmax(logits, dim=-1)).sum(dim=-1)  # (B, n)
        return (losses * self.folds.left_out).sum(dim=1)

    def _problem(self, keep: Tensor, settings: TaskSettings) -> tuple[Tensor, Tensor]:
        """Phi Phi' (B, F, n, m) and Phi W_0' (B, F, n, N) of the folds `keep` (F, m)."""
        classes = keep.unsqueeze(1) * self.target.T  # (F, N, m): coefficients of the class means
        classes = classes / classes.sum(dim=-1, keepdim=True)
        middle = settings.domain.view(-1, 1, 1) * classes.mean(dim=1)  # (B, F, m): of the domain
        gram, start = self.moved.new_zeros(()), self.moved.new_zeros(())
        for part, weight in enumerate(self.metric.weights(settings).unbind(dim=1)):
            g, s = self._cosines(part, classes, middle, settings.guidance)
            gram, start = gram + weight.view(-1, 1, 1, 1) * g, start + weight.view(-1, 1, 1, 1) * s
        return gram, start

    def _cosines(self, part: int, classes: Tensor, middle: Tensor, guidance: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines of a part relative to the domain: to images (B, F, n, m), to starting weights (B, F, n, N).

        `classes` (F, N, m) and `middle` (B, F, m) are the coefficients of class means and domain.
        """
        plain, shrunk, twice = self._products(part, guidance)  # (B, n, m), (B, n, m), (B, m, m)
        across = middle @ plain.mT  # (B, F, n)
        square = (middle * across[:, :, self.rows]).sum(dim=-1)  # (B, F)
        lengths = (self._squares[part].unsqueeze(1) - 2 * across + square.unsqueeze(-1)).clamp_min(0).sqrt()
        lengths = lengths.clamp_min(SHORTEST)  # (B, F, n)
        gram = plain.unsqueeze(1) - across.unsqueeze(-1) - across[:, :, self.rows].unsqueeze(-2)
        gram = (gram + square[..., None, None]) / (lengths.unsqueeze(-1) * lengths[:, :, self.rows].unsqueeze(-2))
        moved = classes - middle.unsqueeze(2)  # (B, F, N, m)
        inner = (moved @ shrunk.mT.unsqueeze(1)).mT  # (B, F, n, N)
        inner = inner - middle.unsqueeze(2) @ inner[:, :, self.rows]
        sizes = ((moved @ twice.unsqueeze(1)) * moved).sum(dim=-1).clamp_min(0).sqrt().clamp_min(SHORTEST)
        return gram, inner / (lengths.unsqueeze(-1) * sizes.unsqueeze(-2))

    def _products(self, part: int, guidance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """X Y', X S Y' and Y S^2 Y' of images X (B, n, D_g) and those that make classifiers, Y (B, m, D_g).

        S is what the posterior mean shrinks a class mean by.
        """
        plain = self._plain[part]
        first = len(self.metric.groups) if self.metric.plain else 0  # of the whitened parts
        if part < first or self.metric.space is None:
            return plain, plain, plain[:, self.rows]
        known, products = self._shrunk.get(part, (None, None))
        if known is not guidance or products is None:
            precision = torch.split(self.metric.space.precision, list(self.metric.groups))[part - first]
            kept = self.keep.sum(dim=1).mean() / self.target.shape[1]  # images per class
            evidence = kept * guidance.view(-1, 1, 1) * precision  # (B, 1, D_g)
            shrunk = self._parts[part][:, self.rows] * (evidence / (1 + evidence))
            products = self._parts[part] @ shrunk.mT, shrunk @ shrunk.mT
            self._shrunk[part] = guidance, products
        return plain, *products

    @cached_property
    def _parts(self) -> list[Tensor]:
        return list(self.metric.split(self.moved))

    @cached_property
    def _plain(self) -> list[Tensor]:
        return [x @ x[:, self.rows].mT for x in self._parts]

    @cached_property
    def _squares(self) -> list[Tensor]:
        return [x.square().sum(dim=-1) for x in self._parts]
