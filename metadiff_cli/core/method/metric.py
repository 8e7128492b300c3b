"""The metric of a task: from features z to the joint feature phi, whose inner products are the logits.

A feature z (D,) consists of groups (the last layer of an encoder, the layers below). Where there are base classes, each
group also has a whitened form, in which the noise within a class is the same in every direction. These are the parts of
the expanded feature x (J,), a linear map of z that is taken once per image:

    x = [z_1, .., z_G, whitened z_1, .., whitened z_G]

The joint feature is taken relative to the domain m of the task, what all its classes share, and weighs the parts:

    phi_p = sqrt(r_p) (x_p - m_p) / |x_p - m_p|        sum of r_p = 1

so phi . phi' is a weighted mean of cosines. The share of a group is a hyper-parameter, and within a group the guidance
scale a says how much the plain form counts beside the whitened one. (Design, section 2b.)
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from metadiff_cli.core.method.support import SupportStats
from metadiff_cli.core.method.task_space import TaskSpace

HALF_TRUST = 10.0  # the guidance scale at which the plain and the whitened form weigh the same
SHORTEST = 1e-5  # what a length counts for at least: features that are alike differ by rounding, up to 1e-6


@dataclass(frozen=True)
class TaskSettings:
    """The hyper-parameters of B tasks: tensors (B,), and two numbers that all of them share.

    `guidance` is a, how far the statistics of the base classes are distrusted (1: not at all; large: the support alone
    counts). `level` is w, the share of all groups of features but the first. `domain` is the share of a task's mean in
    its domain; the mean of the base classes has the rest. `temperature` is the factor T of the confidences. `scale` is
    s and `prior` rho of the inner problem.
    """

    guidance: Tensor
    level: Tensor
    domain: Tensor
    temperature: Tensor
    scale: float
    prior: float

    def of(self, task: int) -> "TaskSettings":
        """Return those of one of the tasks."""
        row = slice(task, task + 1)
        return replace(
            self, guidance=self.guidance[row], level=self.level[row], domain=self.domain[row],
            temperature=self.temperature[row],
        )  # fmt: skip


@dataclass(frozen=True)
class Metric:
    """The parts of the expanded feature: sizes of the groups, and the task space that whitens them.

    Without a `space` there are plain parts alone. With `plain` False there are whitened parts alone.
    """

    groups: tuple[int, ...]
    space: TaskSpace | None = None
    plain: bool = True

    @property
    def parts(self) -> tuple[int, ...]:
        """The sizes of the parts; their sum is J."""
        return (self.groups if self.plain else ()) + (() if self.space is None else self.groups)

    @cached_property
    def origin(self) -> Tensor:
        """The expanded feature (J,) of the mean of the base classes; 0 where there are none."""
        return torch.zeros(()) if self.space is None else self.expand(self.space.mean)

    def whitens(self, part: int) -> bool:
        """Whether a part is the whitened form of a group."""
        return self.space is not None and part >= len(self.parts) - len(self.groups)

    def precision(self, part: int) -> Tensor:
        """Return the precision lambda (D_g,) of the group of a whitened part."""
        assert self.space is not None
        return torch.split(self.space.precision, list(self.groups))[part - len(self.parts)]

    def expand(self, z: Tensor) -> Tensor:
        """Return x (..., J) of features z (..., D)."""
        if self.space is None:
            return z
        white = self.space.whiten(z)
        return torch.cat([z, white], dim=-1) if self.plain else white

    def whitened(self, x: Tensor) -> Tensor:
        """Return the whitened parts (..., D) of x (..., J)."""
        return x[..., sum(self.groups) if self.plain else 0 :]

    def stats(self, moved: Tensor, count: Tensor) -> SupportStats:
        """Return the statistics in task space of classes whose means are `moved` (B, N, J) away from a domain."""
        assert self.space is not None
        precision = self.space.precision
        return SupportStats(self.whitened(moved) / precision.sqrt(), count, precision.view(1, 1, -1))

    def weights(self, settings: TaskSettings) -> Tensor:
        """Return r (B, P), the weights of the parts."""
        level, guidance = settings.level.unsqueeze(-1), settings.guidance.unsqueeze(-1)
        further = len(self.groups) - 1
        shares = torch.cat([1 - level, *[level / further] * further], dim=-1) if further else torch.ones_like(level)
        if self.space is None or not self.plain:
            return shares
        plain = guidance / (guidance + HALF_TRUST)
        return torch.cat([shares * plain, shares * (1 - plain)], dim=-1)

    def embed(self, x: Tensor, domain: Tensor, weights: Tensor) -> Tensor:
        """Return phi (B, n, J) of x (B, n, J), relative to the domain (B, 1, J), with weights (B, P)."""
        moved = x - domain
        factors = (weights.sqrt().unsqueeze(1) / self._lengths(moved)).unbind(dim=-1)  # P of (B, n)
        return torch.cat([part * f.unsqueeze(-1) for part, f in zip(self.split(moved), factors, strict=True)], dim=-1)

    def logits(self, x: Tensor, domain: Tensor, weights: Tensor, classifier: Tensor) -> Tensor:
        """Return phi . w (B, n, N) of x (B, n, J) and a classifier w (B, N, J), without making phi."""
        moved = x - domain
        lengths = self._lengths(moved)  # (B, n, P)
        products = [
            part @ w.mT for part, w in zip(self.split(moved), self.split(classifier), strict=True)
        ]  # P of (B, n, N)
        factors = weights.sqrt().unsqueeze(1) / lengths
        return sum(
            (p * f.unsqueeze(-1) for p, f in zip(products, factors.unbind(-1), strict=True)), start=x.new_zeros(())
        )

    def split(self, x: Tensor) -> Sequence[Tensor]:
        """Return the parts of x (..., J)."""
        return torch.split(x, list(self.parts), dim=-1)

    def _lengths(self, moved: Tensor) -> Tensor:
        """Lengths (B, n, P) of the parts."""
        return torch.stack([torch.linalg.vector_norm(part, dim=-1) for part in self.split(moved)], dim=-1).clamp_min(
            SHORTEST
        )


def cosine_logits(z: Tensor, weights: Tensor, scale: float | Tensor = 1.0, centre: Tensor | None = None) -> Tensor:
    """Return s cos(z, w), (B, Q, N), of features z (B, Q, D) and weights (B, N, D), relative to `centre` (B, 1, D)."""
    if centre is not None:
        z, weights = z - centre, weights - centre
    lengths = torch.linalg.vector_norm(z, dim=-1, keepdim=True).clamp_min(SHORTEST)  # divided by last: Q N, not Q D
    cosines: Tensor = z @ F.normalize(weights, dim=-1).mT / lengths
    return scale * cosines
