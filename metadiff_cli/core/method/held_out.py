"""Held-out logits: each support image under a classifier that was made without it.

In fold f some images are left out, and the inner problem of the rest is solved again. The rest makes the domain, the
starting weights and the descent; no left-out image has a part in any of them. There are at most FOLDS folds, so a class
of that many images or fewer loses one at a time, and a class of one none.

Everything of a fold follows from the Gram matrices of the parts of the support, which are computed once: the domain and
the class means are weighted sums of images. One call serves every use of held-out logits: the choice of the metric, the
temperature of the confidences, the estimate of the accuracy, images that look mislabelled, and rejection.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from metadiff_cli.core.method.descent import Gram, InnerProblem, log_softmax
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
        rows = self.folds.keep.any(dim=0).nonzero().squeeze(1)  # (m,): images that make classifiers
        self.keep, self.target = self.folds.keep[:, rows], support.one_hot()[rows]  # (F, m), (m, N)
        self.products = Products(metric, x, rows)
        self._last: tuple[Tensor, Geometry] | None = None  # a domain share, and all folds relative to that domain

    def logits(self, settings: TaskSettings) -> Tensor:
        """Return s W phi (B, n, N) of each image in the fold that leaves it out, zeros for an image that none does."""
        tasks, count = self.support.x.shape[:2]
        found = self.products.moved.new_zeros(tasks, count, self.target.shape[1])
        at_once = max(1, AT_ONCE // (tasks * count * len(self.target)))
        for first in range(0, len(self.keep), at_once):
            logits = self._fold_logits(slice(first, first + at_once), settings)  # (B, F, n, N)
            fold = torch.arange(first, first + logits.shape[1], device=logits.device)
            here = self.folds.fold == fold.unsqueeze(1)  # (F, n)
            found += (here.unsqueeze(-1) * logits).sum(dim=1)
        if self.places is None:
            return found
        return torch.empty_like(found).scatter_(1, self.places.unsqueeze(-1).expand_as(found), found)

    def loss(self, settings: TaskSettings) -> Tensor:
        """Return the cross-entropy (B,) in nats, summed over the images that are left out."""
        logits = settings.temperature.view(-1, 1, 1) * self.logits(settings)
        losses = -(self.support.one_hot() * log_softmax(logits)).sum(dim=-1)  # (B, n)
        return (losses * self.folds.left_out).sum(dim=1)

    def _fold_logits(self, which: slice, settings: TaskSettings) -> Tensor:
        """The logits (B, F, n, N) of all images in some of the folds, after the descent."""
        keep, rows = self.keep[which], self.products.rows
        geometry = self._geometry(keep, settings.domain)
        weights = self.metric.weights(settings).unbind(dim=1)  # P of (B or 1,)
        gram, start = geometry.gram(weights), geometry.start(weights, settings.guidance)
        problem = InnerProblem(
            Gram(_taken(gram, rows, 2).flatten(0, 1)), _taken(start, rows, 2).flatten(0, 1), self.target,
            settings.scale, settings.prior, keep.repeat(len(self.support.x), 1),
        )  # fmt: skip
        dual = problem.descend(STEPS).view(*start.shape[:2], len(self.target), -1)
        return settings.scale * start + settings.scale**2 * (gram @ dual)

    def _geometry(self, keep: Tensor, share: Tensor) -> "Geometry":
        """The folds `keep` relative to a domain. That of all folds is kept until another domain is asked for."""
        if len(keep) < len(self.keep):
            return Geometry(self.products, keep, self.target, share)
        if self._last is None or self._last[0] is not share:
            self._last = share, Geometry(self.products, keep, self.target, share)
        return self._last[1]


class Products:
    """Inner products of the images of B tasks, for each part of x (B, n, J).

    A domain is a weighted sum of the images in `rows` (m,) and of the mean of the base classes, which is the last of
    n + 1 and of m + 1 rows here. Rows are relative to the mean of the images, so that similar ones keep their digits.
    """

    def __init__(self, metric: Metric, x: Tensor, rows: Tensor) -> None:
        self.metric, self.rows = metric, rows
        mean = x.mean(dim=1, keepdim=True)
        self.moved = torch.cat([x, metric.origin.to(mean).expand_as(mean)], dim=1) - mean  # (B, n + 1, J)
        self.made_of = F.pad(rows, (0, 1), value=x.shape[1])  # (m + 1,)
        self.parts = list(metric.split(self.moved))
        self.matrices = [x @ _taken(x, self.made_of, 1).mT for x in self.parts]  # (B, n + 1, m + 1)
        self.squares = [x.square().sum(dim=-1) for x in self.parts]  # (B, n + 1)


class Geometry:
    """Cosines between the images of B tasks in F folds, relative to the domain that the images of a fold make.

    `share` (B or 1,) is the share of a task's mean in its domain.
    """

    def __init__(self, products: Products, keep: Tensor, target: Tensor, share: Tensor) -> None:
        self.products, self.metric = products, products.metric
        members = keep.unsqueeze(1) * target.T  # (F, N, m)
        self.counts = members.sum(dim=-1, keepdim=True)  # (F, N, 1)
        classes = F.pad(members / self.counts, (0, 1))  # (F, N, m + 1): coefficients of the class means
        share = share.view(-1, 1, 1)
        middle = share * F.pad(keep / keep.sum(dim=1, keepdim=True), (0, 1))  # (B, F, m + 1): of the domain
        middle[..., -1:] = 1 - share
        self.middle, self.means = middle, (classes - middle.unsqueeze(2)).flatten(1, 2)  # (B, F N, m + 1)
        self.across = [middle @ matrix.mT for matrix in products.matrices]  # P of (B, F, n + 1): image . domain
        self.lengths = [self._lengths(part) for part in range(len(products.parts))]
        self._plain: dict[int, Tensor] = {}  # cosines of starting weights that do not depend on the guidance scale

    @cached_property
    def _grams(self) -> list[Tensor]:
        """Cosines of images and images that make classifiers, P of (B, F, n, m)."""
        return [self._cosines(part) for part in range(len(self.products.parts))]

    def gram(self, weights: Sequence[Tensor]) -> Tensor:
        """Return Phi Phi' (B, F, n, m), the mean of the parts with weights P of (B or 1,)."""
        return _mixed(weights, self._grams)

    def start(self, weights: Sequence[Tensor], guidance: Tensor) -> Tensor:
        """Return Phi W_0' (B, F, n, N)."""
        return _mixed(weights, [self._start(part, guidance) for part in range(len(self.products.parts))])

    def _lengths(self, part: int) -> Tensor:
        """Lengths (B, F, n + 1) of a part of the images."""
        across, squares = self.across[part], self.products.squares[part].unsqueeze(1)
        return (squares - 2 * across + self._square(part).unsqueeze(-1)).clamp_min(0).sqrt().clamp_min(SHORTEST)

    def _square(self, part: int) -> Tensor:
        """The squared length (B, F) of a part of the domain."""
        return (self.middle * _taken(self.across[part], self.products.made_of)).sum(dim=-1)

    def _cosines(self, part: int) -> Tensor:
        across, lengths = self.across[part][..., :-1], self.lengths[part][..., :-1]
        rows = self.products.rows
        gram = self.products.matrices[part][:, None, :-1, :-1] - across.unsqueeze(-1)
        gram = gram + (self._square(part).unsqueeze(-1) - _taken(across, rows)).unsqueeze(-2)
        return gram / (lengths.unsqueeze(-1) * _taken(lengths, rows).unsqueeze(-2))

    def _start(self, part: int, guidance: Tensor) -> Tensor:
        """Cosines (B, F, n, N) of images and starting weights."""
        if self.metric.whitens(part):
            return self._cosines_of(part, *self._shrunk(part, guidance))
        if part not in self._plain:
            inner = self.products.matrices[part] @ self.means.mT  # (B, n + 1, F N)
            squares = (self.means.mT * _taken(inner, self.products.made_of, 1)).sum(dim=1)  # (B, F N)
            self._plain[part] = self._cosines_of(part, inner, squares)
        return self._plain[part]

    def _shrunk(self, part: int, guidance: Tensor) -> tuple[Tensor, Tensor]:
        """Products (B, n + 1, F N) with the starting weights of a whitened part, and the weights' squares (B, F N).

        There the posterior mean shrinks class means, as far as a class has few images.
        """
        x = self.products.parts[part]  # (B, n + 1, D_g)
        evidence = self.counts.flatten(0, 1) * guidance.view(-1, 1, 1) * self.metric.precision(part)  # (B, F N, D_g)
        weights = evidence / (1 + evidence) * (self.means @ _taken(x, self.products.made_of, 1))
        return x @ weights.mT, weights.square().sum(dim=-1)

    def _cosines_of(self, part: int, inner: Tensor, squares: Tensor) -> Tensor:
        """Cosines (B, F, n, N) by products with weights (B, n + 1, F N) that are relative to the domain."""
        (folds, ways, _), (tasks, rows, _) = self.counts.shape, inner.shape
        inner = inner.view(tasks, rows, folds, ways).transpose(1, 2)  # (B, F, n + 1, N)
        inner = inner[:, :, :-1] - self.middle.unsqueeze(2) @ _taken(inner, self.products.made_of, 2)
        sizes = squares.clamp_min(0).sqrt().clamp_min(SHORTEST).view(tasks, folds, ways)
        return inner / (self.lengths[part][..., :-1].unsqueeze(-1) * sizes.unsqueeze(-2))


def _mixed(weights: Sequence[Tensor], parts: Sequence[Tensor]) -> Tensor:
    """The sum of parts (B, F, n, .) by weights P of (B or 1,)."""
    total = weights[0].view(-1, 1, 1, 1) * parts[0]
    for weight, part in zip(weights[1:], parts[1:], strict=True):
        total = total + weight.view(-1, 1, 1, 1) * part
    return total


def _taken(x: Tensor, rows: Tensor, dim: int = -1) -> Tensor:
    """Some rows of a dimension; x itself where these are all of them, which is the usual case."""
    return x if len(rows) == x.shape[dim] else x.index_select(dim, rows)
