"""The support of a batch of tasks, and what adaptation sees of it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class TaskSupport:
    """Support features x (B, n, D) of B tasks with the same labels (n,), numbers 0 .. N - 1 each of which occurs."""

    x: Tensor
    labels: Tensor

    @classmethod
    def even(cls, x: Tensor) -> "TaskSupport":
        """Return the support of features (B, N, K, D), where all classes have K images."""
        _, ways, shots, _ = x.shape
        return cls(x.flatten(1, 2), torch.arange(ways, device=x.device).repeat_interleave(shots))

    @property
    def counts(self) -> Tensor:
        """Images per class, (N,)."""
        return torch.bincount(self.labels)

    @property
    def ways(self) -> int:
        """N."""
        return int(self.labels.max()) + 1

    @property
    def shots(self) -> float:
        """K, the mean over the classes where they differ."""
        return len(self.labels) / self.ways

    def one_hot(self) -> Tensor:
        """Return the labels as (n, N)."""
        return F.one_hot(self.labels, self.ways).to(self.x)

    def means(self) -> Tensor:
        """Return the class means (B, N, D)."""
        share = self.one_hot() / self.counts.clamp_min(1)
        return share.T @ self.x

    def middle(self) -> Tensor:
        """Return the mean of all images (B, 1, D): what a task's domain is estimated by.

        Images weigh alike, not classes. The noise of a class is in the domain, and takes logits away from it, as much
        as its mean weighs there times the variance of that mean: with images that weigh alike that is the same for
        every class, and with classes that weigh alike the class with most images would win (docs/experiments.md).
        """
        share = self.counts / len(self.labels)
        return (share.view(1, -1, 1) * self.means()).sum(dim=1, keepdim=True)

    def thinned(self, most: int) -> Tensor:
        """Return the rows of about `most` images or fewer: an equal number of each class, all of a small one."""
        each = max(2, most // self.ways)
        order = torch.argsort(self.labels, stable=True)
        first = torch.cumsum(self.counts, 0) - self.counts
        place = torch.arange(len(order), device=order.device) - first[self.labels[order]]  # of an image in its class
        return order[place < each].sort().values

    def take(self, rows: Tensor | Sequence[int]) -> "TaskSupport":
        """Return the support with the images in `rows` alone; every class keeps one or more."""
        rows = torch.as_tensor(rows, device=self.labels.device)
        return TaskSupport(self.x[:, rows], self.labels[rows])


@dataclass(frozen=True)
class SupportStats:
    """What a denoiser sees of the support of B tasks: mean p (B, N, D), shots K, precision lambda (B or 1, 1, D).

    K has the shape (B or 1, N or 1, 1). Where all classes have the same number of images it is a single number, and
    what follows from it is computed once for all classes.
    """

    mean: Tensor
    count: Tensor
    precision: Tensor

    def scaled(self, guidance: Tensor | float) -> "SupportStats":
        """Return the statistics with a * lambda in place of lambda; `guidance` is a, a number or one per task (B,)."""
        a = guidance.view(-1, 1, 1) if isinstance(guidance, Tensor) else guidance
        return replace(self, precision=self.precision * a)


def support_stats(v: Tensor, precision: Tensor) -> SupportStats:
    """Return the statistics of support images v (B, N, K, D) in task space with precision lambda (D,)."""
    return SupportStats(v.mean(dim=2), v.new_full((1, 1, 1), v.shape[2]), precision.view(1, 1, -1))


def count_of(counts: Tensor) -> Tensor:
    """Return images per class (N,) in the form of `SupportStats.count`: (1, 1, 1) where all are alike."""
    shared = bool((counts == counts[0]).all())
    return (counts[:1] if shared else counts).view(1, -1, 1).float()
