"""Numbers fitted for a grid of ways and shots and read for any task; confidences, and how well they hold."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

FACTORS = tuple(math.exp(0.1 * i) for i in range(-15, 16))  # of a temperature that is tried
TRUST = 2.0  # nats per squared nat that a task's own temperature is away from the fitted one
BINS = 15  # of confidence


@dataclass(frozen=True)
class TaskTable:
    """A smooth function of ways N and shots K: bilinear in log N and log K between the fitted points.

    `values` has a row for each of `ways` and a column for each of `shots`. Raises ValueError for another shape.
    """

    ways: tuple[int, ...]
    shots: tuple[int, ...]
    values: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        if len(self.values) != len(self.ways) or any(len(row) != len(self.shots) for row in self.values):
            raise ValueError("a table has another number of values than of ways and shots")
        if not self.ways or not self.shots or min(*self.ways, *self.shots) < 1:
            raise ValueError("a table has no ways or shots, or some below 1")

    def at(self, way: int, shot: float) -> float:
        """Return the value for N ways and K shots (the mean over the classes); it is constant beyond the grid."""
        along = [np.interp(math.log(max(shot, 1.0)), np.log(self.shots), row) for row in self.values]
        return float(np.interp(math.log(way), np.log(self.ways), along))

    @classmethod
    def of(cls, found: Mapping[tuple[int, int], float]) -> Self:
        """Return the table of the value of every (way, shot) of a grid."""
        ways, shots = (tuple(sorted({pair[i] for pair in found})) for i in (0, 1))
        return cls(ways, shots, tuple(tuple(found[way, shot] for shot in shots) for way in ways))

    @classmethod
    def constant(cls, value: float) -> Self:
        """Return the table with one value for every task."""
        return cls((5,), (1,), ((value,),))


@dataclass(frozen=True)
class Rejection:
    """The threshold on the known score of an image, below which it shows none of a task's classes (rejection.py).

    `offsets` in nats are added to the held-out scores of the support. `rate` is the share (0..1) of images of the
    task's own classes that fell below it on the classes of the fit.
    """

    offsets: TaskTable
    rate: float


def best_temperature(logits: Tensor, labels: Tensor) -> float:
    """Return the factor T in 1e-4..1e3 that minimises the cross-entropy of T * logits (M, N) against labels (M,)."""
    low, high = math.log(1e-4), math.log(1e3)
    ratio = (math.sqrt(5) - 1) / 2

    def loss(log_factor: float) -> float:
        return float(F.cross_entropy(logits * math.exp(log_factor), labels))

    for _ in range(50):  # golden-section search
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        if loss(left) < loss(right):
            high = right
        else:
            low = left
    return math.exp((low + high) / 2)


def task_temperatures(logits: Tensor, target: Tensor, usual: float) -> Tensor:
    """Return the factor T (B,) of each task, from held-out logits (B, M, N) and one-hot labels (M, N).

    T minimises the cross-entropy on the task's own images, and stays near the `usual` one as far as these are few.
    """
    factors = logits.new_tensor(FACTORS)
    losses = [
        -(target * F.log_softmax(usual * factor * logits, dim=-1)).sum(dim=(1, 2)) + TRUST * math.log(factor) ** 2
        for factor in FACTORS
    ]
    return usual * factors[torch.stack(losses).argmin(dim=0)]


def reliability(confidence: Tensor, correct: Tensor) -> list[dict[str, float]]:
    """Return mean confidence and accuracy, both in 0..1, and count of each bin of confidence (M,) that is not empty."""
    bucket = (confidence * BINS).long().clamp(0, BINS - 1)
    sums = torch.zeros(3, BINS, dtype=torch.float64)
    for row, values in zip(sums, (confidence, correct, torch.ones_like(confidence)), strict=True):
        row.index_add_(0, bucket, values.double())
    return [
        {"confidence": float(p / n), "accuracy": float(hits / n), "count": int(n)} for p, hits, n in sums.T if n > 0
    ]


def calibration_error(confidence: Tensor, correct: Tensor) -> float:
    """Return the expected calibration error in percent, equal-width bins of confidence (M,) (Guo et al. 2017)."""
    gaps = (b["count"] * abs(b["confidence"] - b["accuracy"]) for b in reliability(confidence, correct))
    return 100 * sum(gaps) / max(len(confidence), 1)
