"""Held-out logits: each support image under a classifier that was made without it.

In fold f some images are left out, and the inner problem of the rest is solved again. The rest makes the domain, the
starting weights and the descent; no left-out image has a part in any of them. There are at most FOLDS folds, so a class
of that many images or fewer loses one at a time, and a class of one none.

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

FOLDS = 5
FEW_FOLDS, MANY = 2, 400  # folds of a support of more than so many images
MOST = 1000  # images of a support that are held out: time grows with their cube
STEPS = 6  # of descent: nearly as far toward the minimum as the ten steps of the sampler
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
        place = torch.empty_like(labels)  # of an image in its class
        place[order] = torch.arange(len(labels), device=labels.device) - first[labels[order]]
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


def _by_content(support: TaskSupport) -> Tensor:
    """For each place the image (B, n) of its class that takes it, in an order that follows from the images alone."""
    order = support.x.sum(dim=-1).argsort(dim=1)
    order = order.gather(1, support.labels[order].argsort(dim=1, stable=True))
    places = torch.empty_like(order)
    places[:, support.labels.argsort(stable=True)] = order
    return places


def holdable(support: TaskSupport) -> TaskSupport:
    """Return the support itself, or MOST of its images where there are more: enough to choose and to estimate by."""
    return support if len(support.labels) <= MOST else support.take(support.thinned(MOST))


class HeldOut:
    """The held-out logits of B tasks with expanded features x (B, n, J), for any hyper-parameters."""

    def __init__(self, metric: Metric, support: TaskSupport, folds: Folds | None = None) -> None:
        """`folds` None are those of the support, `Folds.of`, whatever the order of the images of a class."""
        self.metric, self.support = metric, support
        self.places = _by_content(support) if folds is None else None
        self.folds = Folds.of(support.labels) if folds is None else folds
        x = support.x if self.places is None else support.x.gather(1, self.places.unsqueeze(-1).expand_as(support.x))
        self.rows = self.folds.keep.any(dim=0).nonzero().squeeze(1)  # (m,): images that make classifiers
        self.keep = self.folds.keep[:, self.rows]  # (F, m)
        self.target = support.one_hot()[self.rows]  # (m, N)
        # images relative to their mean, so that the products of similar ones keep their digits; the mean of the base
        # classes is a further row, and a further one of those that domains are made of
        mean = x.mean(dim=1, keepdim=True)
        self.moved = torch.cat([x, metric.origin.to(mean).expand_as(mean)], dim=1) - mean  # (B, n + 1, J)
        self.made_of = F.pad(self.rows, (0, 1), value=support.x.shape[1])  # (m + 1,)
        self._last: dict[int, tuple[TaskSettings, Tensor, Tensor]] = {}  # by part: cosines and what they are for

    def logits(self, settings: TaskSettings) -> Tensor:
        """Return s W phi (B, n, N) of each image in the fold that leaves it out, zeros for an image that none does."""
        tasks, count = self.support.x.shape[:2]
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
        if self.places is None:
            return found
        return torch.empty_like(found).scatter_(1, self.places.unsqueeze(-1).expand_as(found), found)

    def loss(self, settings: TaskSettings) -> Tensor:
        """Return the cross-entropy (B,) in nats, summed over the images that are left out."""
        logits = settings.temperature.view(-1, 1, 1) * self.logits(settings)
        losses = -(self.support.one_hot() * F.log_softmax(logits, dim=-1)).sum(dim=-1)  # (B, n)
        return (losses * self.folds.left_out).sum(dim=1)

    def _problem(self, keep: Tensor, settings: TaskSettings) -> tuple[Tensor, Tensor]:
        """Phi Phi' (B, F, n, m) and Phi W_0' (B, F, n, N) of the folds `keep` (F, m)."""
        members = keep.unsqueeze(1) * self.target.T  # (F, N, m)
        counts = members.sum(dim=-1, keepdim=True)  # (F, N, 1)
        classes = F.pad(members / counts, (0, 1))  # (F, N, m + 1): coefficients of the class means
        share = settings.domain.view(-1, 1, 1)
        middle = share * classes.mean(dim=1)  # (B, F, m + 1): of the domain
        middle[..., -1:] = 1 - share
        gram, start = self.moved.new_zeros(()), self.moved.new_zeros(())
        for part, weight in enumerate(self.metric.weights(settings).unbind(dim=1)):
            g, s = self._known(part, settings) or self._cosines(part, classes, counts, middle, settings.guidance)
            if len(keep) == len(self.keep) and g.numel() * len(self.metric.parts) <= AT_ONCE:
                self._last[part] = settings, g, s
            gram, start = gram + weight.view(-1, 1, 1, 1) * g, start + weight.view(-1, 1, 1, 1) * s
        return gram[:, :, :-1, :-1], start[:, :, :-1]

    def _known(self, part: int, settings: TaskSettings) -> tuple[Tensor, Tensor] | None:
        """The last cosines of a part, if the hyper-parameters that they depend on are the same tensors now."""
        if part not in self._last:
            return None
        last, gram, start = self._last[part]
        same_guidance = last.guidance is settings.guidance or not self._whitened(part)
        return (gram, start) if last.domain is settings.domain and same_guidance else None

    def _whitened(self, part: int) -> bool:
        return self.metric.space is not None and part >= (len(self.metric.groups) if self.metric.plain else 0)

    def _cosines(
        self, part: int, classes: Tensor, counts: Tensor, middle: Tensor, guidance: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Cosines of a part relative to the domain: to images (B, F, n + 1, m + 1), to weights (B, F, n + 1, N).

        `classes` (F, N, m + 1) and `middle` (B, F, m + 1) are the coefficients of class means and domain.
        """
        products = self._products[part]  # (B, n + 1, m + 1)
        across = middle @ products.mT  # (B, F, n + 1)
        square = (middle * across[:, :, self.made_of]).sum(dim=-1)  # (B, F)
        lengths = (self._squares[part].unsqueeze(1) - 2 * across + square.unsqueeze(-1)).clamp_min(0).sqrt()
        lengths = lengths.clamp_min(SHORTEST)  # (B, F, n + 1)
        gram = products.unsqueeze(1) - across.unsqueeze(-1) - across[:, :, self.made_of].unsqueeze(-2)
        gram = (gram + square[..., None, None]) / (lengths.unsqueeze(-1) * lengths[:, :, self.made_of].unsqueeze(-2))
        inner, sizes = self._weights(part, classes - middle.unsqueeze(2), counts, guidance)
        inner = inner - middle.unsqueeze(2) @ inner[:, :, self.made_of]
        return gram, inner / (lengths.unsqueeze(-1) * sizes.unsqueeze(-2))

    def _weights(self, part: int, means: Tensor, counts: Tensor, guidance: Tensor) -> tuple[Tensor, Tensor]:
        """Products of images and starting weights (B, F, n + 1, N), and lengths (B, F, N) of the weights.

        `means` (B, F, N, m + 1) are the coefficients of class means relative to the domain. In a whitened part the
        posterior mean shrinks them, as far as a class has few images.
        """
        tasks, (folds, ways) = len(self.support.x), means.shape[1:3]  # all tasks may share the coefficients
        means = means.flatten(1, 2)  # (B, F N, m + 1)
        if self.metric.space is None or not self._whitened(part):
            inner = self._products[part] @ means.mT  # (B, n + 1, F N)
            squares = (means.mT * inner[:, self.made_of]).sum(dim=1)  # (B, F N)
        else:
            x = self._parts[part]  # (B, n + 1, D_g)
            precision = torch.split(self.metric.space.precision, list(self.metric.groups))[
                part % len(self.metric.groups)
            ]
            evidence = counts.flatten(0, 1) * guidance.view(-1, 1, 1) * precision  # (B, F N, D_g)
            weights = evidence / (1 + evidence) * (means @ x[:, self.made_of])
            inner, squares = x @ weights.mT, weights.square().sum(dim=-1)
        sizes = squares.clamp_min(0).sqrt().clamp_min(SHORTEST)
        return inner.view(tasks, -1, folds, ways).transpose(1, 2), sizes.view(tasks, folds, ways)

    @cached_property
    def _parts(self) -> list[Tensor]:
        return list(self.metric.split(self.moved))

    @cached_property
    def _products(self) -> list[Tensor]:
        return [x @ x[:, self.made_of].mT for x in self._parts]

    @cached_property
    def _squares(self) -> list[Tensor]:
        return [x.square().sum(dim=-1) for x in self._parts]
