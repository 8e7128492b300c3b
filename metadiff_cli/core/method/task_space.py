"""The task space: features re-expressed so that the classes of the world look like N(0, I).

The basis of linear discriminant analysis. From base features: mean of the class means mu, within-class covariance S_w,
between-class covariance S_b = Cov(class means) - S_w / n, both shrunk toward a multiple of the identity. A solves
A' S_b A = I and A' S_w A = diag(1 / lambda). In v = A'(z - mu) a class mean has unit variance under the shrunk model,
and an image is its class mean plus noise of variance 1 / lambda_d. (Design, section 2.)
"""

import math
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from metadiff_cli.errors import DataError

CHUNK = 4096  # images whose products are summed at once
BLOCKS = 4  # of the rows of a scatter matrix


@dataclass(frozen=True)
class TaskSpace:
    """Affine map between features z (D,) and task space v (D,)."""

    mean: Tensor  # (D,) mu; (B, 1, D) in the spaces of B tasks
    basis: Tensor  # (D, D) A
    inverse: Tensor  # (D, D) A^-T
    precision: Tensor  # (D,) lambda, of an image around its class mean
    centre: Tensor | None = None  # as `mean`, what plain cosines are relative to; None: the origin

    def to_task(self, z: Tensor) -> Tensor:
        """v (..., D) of features z (..., D)."""
        return (z - self.mean) @ self.basis

    def to_feature(self, v: Tensor) -> Tensor:
        """z (..., D) of points v (..., D) in task space."""
        return v @ self.inverse.T + self.mean

    def whiten(self, z: Tensor) -> Tensor:
        """Task space in units of the noise of an image, (..., D) of features z (..., D): the metric S_w^-1."""
        return self.to_task(z) * self.precision.sqrt()

    def squares(self, z: Tensor) -> Tensor:
        """Squared lengths (...) of whitened features z (..., D)."""
        return self.to_task(z).square() @ self.precision

    def squares_around(self, mean: Tensor, z: Tensor, squares: Tensor) -> Tensor:
        """`squares` (B, Q) of z (B, Q, D) as they are in the spaces `around(mean)`, without a projection of z."""
        moved = (mean - self.mean) @ self.basis  # (B, 1, D)
        scaled = moved * self.precision
        direction = scaled @ self.basis.T
        inner = (z @ direction.mT).squeeze(-1) - self.mean @ direction.mT  # (B, Q)
        return squares - 2 * inner + (moved * scaled).sum(dim=-1)

    def plain(self, z: Tensor) -> Tensor:
        """Features z (..., D) as plain cosines take them."""
        return z if self.centre is None else z - self.centre

    def centred(self, yes: bool) -> "TaskSpace":
        """With plain cosines relative to mu, or to the origin."""
        return replace(self, centre=self.mean if yes else None)

    def around(self, mean: Tensor) -> "TaskSpace":
        """With the prior's mean elsewhere: at the points mean (B, 1, D) in feature space, one for each of B tasks."""
        return replace(self, mean=mean, centre=None if self.centre is None else mean)

    def of_task(self, task: int) -> "TaskSpace":
        """The space of one of the B tasks."""
        return self.around(self.mean[task, 0])

    def to(self, device: torch.device) -> "TaskSpace":
        """The same space on another device."""
        moved = TaskSpace(*(t.to(device) for t in (self.mean, self.basis, self.inverse, self.precision)))
        return moved.centred(self.centre is not None)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint stores."""
        return {"mean": self.mean, "basis": self.basis, "inverse": self.inverse, "precision": self.precision}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> "TaskSpace":
        """From what `tensors` gave. Raises ValueError when the shapes do not belong together."""
        size = len(tensors["mean"])
        square, line = [(size, size)] * 2, [(size,)] * 2
        if [tuple(tensors[name].shape) for name in ("basis", "inverse", "mean", "precision")] != square + line:
            raise ValueError("the tensors of its task space do not fit each other")
        return cls(tensors["mean"], tensors["basis"], tensors["inverse"], tensors["precision"])


@dataclass(frozen=True)
class ClassStatistics:
    """Of the features of base classes, in float64: class means (C, D), their mean (D,), S_w and S_b (D, D)."""

    means: Tensor
    mean: Tensor
    within: Tensor
    between: Tensor

    def task_space(self, shrink_within: float = 0.5, shrink_between: float = 0.3, floor: float = 1e-3) -> TaskSpace:
        """`shrink_*` is the share (0..1) of tr(S)/D times the identity; lambda is floored at `floor` of its maximum."""
        within, between = _shrink(self.within, shrink_within), _shrink(self.between, shrink_between)
        return _solve(self.mean, within, between, floor, len(self.mean))


def class_statistics(classes: Iterable[Tensor]) -> ClassStatistics:
    """From the features of base classes, one tensor (n_c, D) a class; they are read once, one after the other.

    Raises DataError for features that are not finite, a class without images, and fewer than two classes.
    """
    means, scatter, total, inverse_counts = _moments(classes)
    count = len(means)
    within = scatter / max(total - count, 1)
    mean = means.mean(dim=0)
    centred = means - mean
    return ClassStatistics(means, mean, within, centred.T @ centred / (count - 1) - within * inverse_counts)


def fit_task_space(
    classes: Iterable[Tensor], *, shrink_within: float = 0.5, shrink_between: float = 0.3, floor: float = 1e-3
) -> TaskSpace:
    """The task space of base classes; see `class_statistics` and `ClassStatistics.task_space`."""
    return class_statistics(classes).task_space(shrink_within, shrink_between, floor)


def class_means(classes: Iterable[Tensor]) -> Tensor:
    """Means (C, D) in float64 of classes of features (n_c, D). Raises DataError as `class_statistics` does."""
    means = _Means()
    for features in classes:
        means.add(_mean(features))
    return means.stacked()


def identity_space(classes: Iterable[Tensor]) -> TaskSpace:
    """Features as they are, but for one common scale that gives class means unit mean square (denoiser `paper`)."""
    means = class_means(classes)
    scale = 1.0 / means.pow(2).mean().sqrt().clamp_min(1e-12)
    eye = torch.eye(means.shape[1], dtype=torch.float64)
    zero, one = torch.zeros_like(means[0]), torch.ones_like(means[0])
    return TaskSpace(*(t.float() for t in (zero, eye * scale, eye / scale, one)))


def _moments(classes: Iterable[Tensor]) -> tuple[Tensor, Tensor, int, float]:
    """Class means (C, D), within-class scatter (D, D), number of images, mean of 1 / n_c; in float64."""
    means, within, total, inverse = _Means(), None, 0, 0.0
    for features in classes:
        mean = _mean(features)
        within = torch.zeros(len(mean), len(mean), dtype=torch.float64) if within is None else within
        _add_scatter(within, features, mean)
        means.add(mean)
        total += len(features)
        inverse += 1.0 / len(features)
    stacked = means.stacked()
    assert within is not None
    return stacked, within.triu() + within.triu(1).T, total, inverse / len(stacked)


class _Means:
    """Class means (D,) in one growing block: many small ones would lie between large ones and keep their memory."""

    def __init__(self) -> None:
        self.values, self.count = array("d"), 0

    def add(self, mean: Tensor) -> None:
        """Take in the mean of a further class."""
        self.values.frombytes(mean.numpy().tobytes())
        self.count += 1

    def stacked(self) -> Tensor:
        """(C, D). Raises DataError for fewer than two classes."""
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

    Products are taken in the features' own precision: the differences have no more digits than that.
    """
    step = math.ceil(len(scatter) / BLOCKS)
    for part in torch.split(features, CHUNK):
        rest = part - mean.to(part.dtype)
        for start in range(0, len(scatter), step):  # below lies the same once more, which takes time
            scatter[start : start + step, start:] += rest[:, start : start + step].T @ rest[:, start:]


def _shrink(s: Tensor, share: float) -> Tensor:
    """Shrink a covariance (D, D) toward its mean variance; a floor keeps constant features finite."""
    size = len(s)
    variance = (s.diagonal().sum() / size).clamp_min(1e-12)
    return (1 - share) * s + (share * variance + 1e-9 * variance) * torch.eye(size, dtype=s.dtype)


def _solve(mean: Tensor, s_w: Tensor, s_b: Tensor, floor: float, size: int) -> TaskSpace:
    """The generalised eigenproblem S_b a = lambda S_w a, by whitening S_w; A scaled so that A' S_b A = I."""
    factor = torch.linalg.cholesky(s_w)
    inner = torch.linalg.solve_triangular(factor, s_b, upper=False)
    inner = torch.linalg.solve_triangular(factor, inner.T, upper=False)  # L^-1 S_b L^-T
    values, vectors = torch.linalg.eigh((inner + inner.T) / 2)
    values, vectors = values.flip(0), vectors.flip(1)
    lam = values.clamp_min(floor * values[0].clamp_min(1e-12))
    # with U orthonormal, A = L^-T U diag(lam^-1/2) gives A' S_w A = 1/lam, and A' S_b A = 1 where lam is not floored
    basis = torch.linalg.solve_triangular(factor.T, vectors, upper=True) * lam.rsqrt()
    inverse = factor @ vectors * lam.sqrt()
    return TaskSpace(*(t.float().contiguous() for t in (mean, basis, inverse, lam)))
