"""The task space: features re-expressed so that the classes of the world look like N(0, I).

The basis of linear discriminant analysis. From base features follow the mean mu of the class means, the within-class
covariance S_w and the between-class covariance S_b = Cov(class means) - S_w / n, both shrunk toward a multiple of the
identity. A solves A' S_b A = I and A' S_w A = diag(1 / lambda). In v = A'(z - mu) a class mean has unit variance under
the shrunk model, and an image is its class mean plus noise of variance 1 / lambda_d. (Design, section 2.)

Features may consist of groups, such as the last layer of an encoder and the layers below. Each group has a basis of its
own: A is block diagonal, and covariances between groups are not estimated.
"""

import math
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from metadiff_cli.errors import DataError

CHUNK = 4096  # images whose products are summed at once
BLOCKS = 4  # of the rows of a scatter matrix
FLOOR = 1e-3  # of the largest lambda: below it a direction tells nothing about new classes
LEAST = 1e-3  # of tr(S_w): what tr(S_b) counts for at least, where so few classes are given that it is negative


@dataclass(frozen=True)
class TaskSpace:
    """Linear map between features z (D,) and task space v (D,)."""

    mean: Tensor  # (D,) mu
    bases: tuple[Tensor, ...]  # (D_g, D_g) for each group: the blocks of A
    precision: Tensor  # (D,) lambda, of an image around its class mean

    @property
    def groups(self) -> tuple[int, ...]:
        """The sizes D_g of the groups of features; their sum is D."""
        return tuple(len(basis) for basis in self.bases)

    def to_task(self, z: Tensor) -> Tensor:
        """Return v (..., D) of features z (..., D)."""
        parts = torch.split(z - self.mean, list(self.groups), dim=-1)
        products = [part @ basis for part, basis in zip(parts, self.bases, strict=True)]
        return products[0] if len(products) == 1 else torch.cat(products, dim=-1)

    def whiten(self, z: Tensor) -> Tensor:
        """Return v in units of the noise of an image, (..., D) of features z (..., D): there S_w is the identity."""
        return self.to_task(z) * self.precision.sqrt()

    def to(self, device: torch.device) -> "TaskSpace":
        """Return the same space on another device."""
        return TaskSpace(self.mean.to(device), tuple(b.to(device) for b in self.bases), self.precision.to(device))

    def tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint stores, by name."""
        return {
            "mean": self.mean,
            "precision": self.precision,
            **{f"basis.{g}": b for g, b in enumerate(self.bases)},
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> "TaskSpace":
        """Return the space that `tensors` describes."""
        bases = tuple(tensors[f"basis.{g}"].float() for g in range(len(tensors) - 2))
        return cls(tensors["mean"].float(), bases, tensors["precision"].float())


@dataclass(frozen=True)
class ClassStatistics:
    """Statistics of the features of base classes, in float64: class means (C, D), and S_w and S_b per group."""

    means: Tensor
    within: tuple[Tensor, ...]  # (D_g, D_g) for each group
    between: tuple[Tensor, ...]

    def task_space(self, shrink_within: float = 0.5, shrink_between: float = 0.3) -> TaskSpace:
        """Return the task space; `shrink_*` is the share (0..1) of tr(S)/D_g times the identity in each group."""
        solved = [
            _solve(_shrink(within, shrink_within), _shrink(_at_least(between, within), shrink_between))
            for within, between in zip(self.within, self.between, strict=True)
        ]
        precision = torch.cat([values for _, values in solved])
        return TaskSpace(self.means.mean(dim=0).float(), tuple(_rounded(b) for b, _ in solved), precision.float())

    @property
    def groups(self) -> tuple[int, ...]:
        """The sizes of the groups of features."""
        return tuple(len(within) for within in self.within)

    @property
    def collapsed(self) -> bool:
        """Whether the class means of a group vary less than their noise: too few classes, or images without classes."""
        return any(bool(_at_least(b, w) is not b) for w, b in zip(self.within, self.between, strict=True))


def class_statistics(classes: Iterable[Tensor], groups: Sequence[int] = ()) -> ClassStatistics:
    """Return the statistics of base classes, one tensor (n_c, D) per class; they are read once, one after the other.

    `groups` are the sizes of the groups of features; empty: one group. Raises DataError for features that are not
    finite, a class without images, and fewer than two classes.
    """
    moments = _Moments.of(classes, tuple(groups))
    return moments.statistics(moments.parts)


def cross_fitted(
    classes: Iterable[Tensor], groups: Sequence[int], parts: Sequence[int]
) -> tuple[ClassStatistics, dict[int, ClassStatistics]]:
    """Return the statistics of all base classes, and for each part those of the classes outside of it.

    `parts` has the number of the part of each class, or -1 for a class that is in none, so in all statistics. Classes
    are read once, and errors are those of `class_statistics`.
    """
    moments = _Moments.of(classes, tuple(groups), parts)
    rest = {part: moments.statistics(moments.parts - {part}) for part in sorted(moments.parts) if part >= 0}
    return moments.statistics(moments.parts), rest


def class_means(classes: Iterable[Tensor]) -> Tensor:
    """Return the means (C, D) in float64 of classes of features (n_c, D). Raises DataError as `class_statistics`."""
    means = _Means()
    for features in classes:
        means.add(_mean(features))
    return means.stacked()


def identity_space(means: Tensor) -> TaskSpace:
    """Return features as they are, times one number that gives class means (C, D) unit mean square (`paper`)."""
    scale = 1.0 / means.pow(2).mean().sqrt().clamp_min(1e-12)
    size = means.shape[1]
    return TaskSpace(torch.zeros(size), ((torch.eye(size) * scale).float(),), torch.ones(size))


@dataclass(frozen=True)
class _Moments:
    """Of C base classes, in float64: means (C, D), images, parts, and the scatter within classes of each part."""

    means: Tensor
    counts: tuple[int, ...]
    part: tuple[int, ...]
    scatter: dict[int, list[Tensor]]

    @classmethod
    def of(cls, classes: Iterable[Tensor], groups: tuple[int, ...], parts: Sequence[int] | None = None) -> "_Moments":
        """Return those of classes (n_c, D), which are all of part 0 where no `parts` are given."""
        means, counts, part = _Means(), list[int](), list[int]()
        scatter: dict[int, list[Tensor]] = {}
        for number, features in enumerate(classes):
            mean = _mean(features)
            sizes = list(groups or (len(mean),))
            part.append(0 if parts is None else parts[number])
            sums = scatter.setdefault(part[-1], [])
            sums += [torch.zeros(size, size, dtype=torch.float64) for size in sizes[len(sums) :]]
            for s, z, m in zip(sums, torch.split(features, sizes, dim=1), torch.split(mean, sizes), strict=True):
                _add_scatter(s, z, m)
            means.add(mean)
            counts.append(len(features))
        return cls(means.stacked(), tuple(counts), tuple(part), scatter)

    @property
    def parts(self) -> set[int]:
        """The numbers of the parts."""
        return set(self.part)

    def statistics(self, parts: set[int]) -> ClassStatistics:
        """Return the statistics of the classes in some parts."""
        chosen = [c for c, part in enumerate(self.part) if part in parts]
        means, count, images = self.means[chosen], len(chosen), sum(self.counts[c] for c in chosen)
        upper = [torch.stack(sums).sum(dim=0) for sums in zip(*(self.scatter[part] for part in parts), strict=True)]
        within = [(s.triu() + s.triu(1).T) / max(images - count, 1) for s in upper]
        inverse = sum(1.0 / self.counts[c] for c in chosen) / count
        centred = torch.split(means - means.mean(dim=0), [len(w) for w in within], dim=1)
        between = [c.T @ c / (count - 1) - w * inverse for c, w in zip(centred, within, strict=True)]
        return ClassStatistics(means, tuple(within), tuple(between))


class _Means:
    """Class means (D,) in one growing block: many small ones would lie between large ones and keep their memory."""

    def __init__(self) -> None:
        self.values, self.count = array("d"), 0

    def add(self, mean: Tensor) -> None:
        """Take in the mean of a further class."""
        self.values.frombytes(mean.numpy().tobytes())
        self.count += 1

    def stacked(self) -> Tensor:
        """Return all means (C, D). Raises DataError for fewer than two classes."""
        if self.count < 2:
            raise DataError(
                "a task space needs at least 2 base classes", hint="add class folders to the training split"
            )
        return torch.tensor(self.values, dtype=torch.float64).view(self.count, -1)


def _mean(features: Tensor) -> Tensor:
    """Mean (D,) in float64 of the features (n, D) of a class, a chunk at a time."""
    if len(features) == 0:
        raise DataError("a base class has no images", hint="remove its folder, or add images to it")
    total = torch.stack([part.sum(dim=0, dtype=torch.float64) for part in torch.split(features, CHUNK)]).sum(dim=0)
    if not bool(torch.isfinite(total).all()):  # one value that is not finite makes the sum so
        raise DataError("features of the base classes are not finite", hint="train or choose another encoder")
    return total / len(features)


def _add_scatter(scatter: Tensor, features: Tensor, mean: Tensor) -> None:
    """Add the sum of (z - mean)(z - mean)' over features (n, D) to the upper blocks of `scatter` (D, D) in float64.

    Products are taken in the precision of the features: the differences have no more digits than that.
    """
    step = math.ceil(len(scatter) / BLOCKS)
    for part in torch.split(features, CHUNK):
        rest = part - mean.to(part.dtype)
        for start in range(0, len(scatter), step):  # the lower half is its mirror image
            scatter[start : start + step, start:] += rest[:, start : start + step].T @ rest[:, start:]


def _at_least(between: Tensor, within: Tensor) -> Tensor:
    """S_b, or where its trace is below LEAST of that of S_w, a multiple of the identity with just that trace."""
    least = LEAST * within.diagonal().sum()
    if between.diagonal().sum() >= least:
        return between
    return torch.eye(len(between), dtype=between.dtype) * (least / len(between))


def _rounded(basis: Tensor) -> Tensor:
    """A basis to the digits of 16 bits, which files hold: its error is far below that of the covariances."""
    half = basis.half()
    return (half if bool(torch.isfinite(half).all()) else basis).float().contiguous()


def _shrink(s: Tensor, share: float) -> Tensor:
    """Shrink a covariance (D, D) toward its mean variance; a floor keeps constant features finite."""
    size = len(s)
    variance = (s.diagonal().sum() / size).clamp_min(1e-12)
    return (1 - share) * s + (share * variance + 1e-9 * variance) * torch.eye(size, dtype=s.dtype)


def _solve(s_w: Tensor, s_b: Tensor) -> tuple[Tensor, Tensor]:
    """Basis A and lambda (D,) of S_b a = lambda S_w a, by whitening S_w; A is scaled so that A' S_b A = I."""
    factor = torch.linalg.cholesky(s_w)
    inner = torch.linalg.solve_triangular(factor, s_b, upper=False)
    inner = torch.linalg.solve_triangular(factor, inner.T, upper=False)  # L^-1 S_b L^-T
    values, vectors = torch.linalg.eigh((inner + inner.T) / 2)
    values, vectors = values.flip(0), vectors.flip(1)
    lam = values.clamp_min(FLOOR * values[0].clamp_min(1e-12))
    # with U orthonormal, A = L^-T U diag(lam^-1/2) gives A' S_w A = 1/lam, and A' S_b A = 1 where lam is not floored
    return torch.linalg.solve_triangular(factor.T, vectors, upper=True) * lam.rsqrt(), lam
