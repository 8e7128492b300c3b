"""The support of a batch of tasks as features: what a classifier is adapted to, and what a denoiser sees of it."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class TaskSupport:
    """Support features z (B, n, D) of B tasks that have the same numbers of images per class.

    `labels` (n,) are the classes of the images, `means` (B, N, D) the means of the classes, and `count` (N, 1) the
    images per class, which may differ from class to class.
    """

    z: Tensor
    labels: Tensor
    means: Tensor
    count: Tensor

    @classmethod
    def of(cls, z: Tensor, labels: Tensor) -> "TaskSupport":
        """From features (B, n, D) and labels (n,) in 0 .. N - 1; every class has an image."""
        means = torch.stack([z[:, labels == c].mean(dim=1) for c in range(int(labels.max()) + 1)], dim=1)
        return cls(z, labels, means, torch.bincount(labels).unsqueeze(1).to(z))

    @classmethod
    def even(cls, z: Tensor) -> "TaskSupport":
        """From features (B, N, K, D): every class has K images."""
        _, ways, shots, _ = z.shape
        labels = torch.arange(ways, device=z.device).repeat_interleave(shots)
        return cls(z.flatten(1, 2), labels, z.mean(dim=2), z.new_full((ways, 1), shots))

    def parts(self, values: int = 16_000_000) -> Iterator["TaskSupport"]:
        """Split the images, but not the classes, into parts whose features are at most about `values` numbers."""
        step = max(1, values // (len(self.z) * self.z.shape[2]))
        for start in range(0, len(self.labels), step):
            rows = slice(start, start + step)
            yield TaskSupport(self.z[:, rows], self.labels[rows], self.means, self.count)


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
