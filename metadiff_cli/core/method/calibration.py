"""Numbers fitted on validation classes for a grid of tasks and read for any task, and how well confidences hold."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST_LOG = 50.0  # of a logit scale


@dataclass(frozen=True)
class TaskTable:
    """A smooth function of ways N and shots K: bilinear in log N and log K between the fitted points."""

    ways: tuple[int, ...]
    shots: tuple[int, ...]
    values: tuple[tuple[float, ...], ...]  # a row for each of `ways`

    def __post_init__(self) -> None:
        """Raises ValueError unless there is a row for each of the ways and in it a value for each of the shots."""
        shaped = len(self.values) == len(self.ways) and all(len(row) == len(self.shots) for row in self.values)
        if not (shaped and self.ways and self.shots and min(*self.ways, *self.shots) >= 1):
            raise ValueError("the table does not have a value for each of its ways and shots from 1 on")

    def at(self, way: int, shot: float) -> float:
        """The value for N ways and K shots (the mean over the classes when they differ); constant beyond the grid."""
        along = [np.interp(math.log(max(shot, 1.0)), np.log(self.shots), row) for row in self.values]
        return float(np.interp(math.log(way), np.log(self.ways), along))

    @classmethod
    def of(cls, found: Mapping[tuple[int, int], float]) -> Self:
        """From the value of every (way, shot) of a grid."""
        ways, shots = (tuple(sorted({pair[i] for pair in found})) for i in (0, 1))
        return cls(ways, shots, tuple(tuple(found[way, shot] for shot in shots) for way in ways))


@dataclass(frozen=True)
class Calibration:
    """Logit scale s as a smooth function of the task: log s, bilinear in log N and log K between the fitted points."""

    ways: tuple[int, ...] = (5,)
    shots: tuple[int, ...] = (1,)
    log_scales: tuple[tuple[float, ...], ...] = ((math.log(10.0),),)  # a row for each of `ways`

    def __post_init__(self) -> None:
        """Raises ValueError for a table of another shape, and for logarithms of scales that float32 cannot hold."""
        TaskTable(self.ways, self.shots, self.log_scales)
        if any(abs(log) > LARGEST_LOG for row in self.log_scales for log in row):
            raise ValueError("a logit scale is out of all bounds")

    def scale(self, way: int, shot: float) -> float:
        """s for N ways and K shots (the mean over the classes when shots differ); constant beyond the fitted points."""
        return math.exp(TaskTable(self.ways, self.shots, self.log_scales).at(way, shot))


def best_scale(cosines: Tensor, labels: Tensor) -> float:
    """The scale s that minimises the cross-entropy of s * cosines (M, N) against labels (M,); golden-section search."""
    low, high = math.log(0.5), math.log(500.0)
    ratio = (math.sqrt(5) - 1) / 2

    def loss(log_scale: float) -> float:
        return float(F.cross_entropy(cosines * math.exp(log_scale), labels))

    for _ in range(40):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        if loss(left) < loss(right):
            high = right
        else:
            low = left
    return math.exp((low + high) / 2)


def fit_calibration(scales: Mapping[tuple[int, int], float]) -> Calibration:
    """From the best scale of every (way, shot) of a grid."""
    table = TaskTable.of({pair: math.log(scale) for pair, scale in scales.items()})
    return Calibration(table.ways, table.shots, table.values)


def reliability(confidence: Tensor, correct: Tensor, bins: int = 15) -> list[dict[str, float]]:
    """Mean confidence and accuracy, both in 0..1, and count of each bin of confidence (M,) that is not empty."""
    bucket = (confidence * bins).long().clamp(0, bins - 1)
    sums = torch.zeros(3, bins, dtype=torch.float64)
    for row, values in zip(sums, (confidence, correct, torch.ones_like(confidence)), strict=True):
        row.index_add_(0, bucket, values.double())
    return [
        {"confidence": float(p / n), "accuracy": float(hits / n), "count": int(n)} for p, hits, n in sums.T if n > 0
    ]


def calibration_error(confidence: Tensor, correct: Tensor, bins: int = 15) -> float:
    """Expected calibration error in percent, equal-width bins of confidence (M,) (Guo et al. 2017)."""
    gaps = (b["count"] * abs(b["confidence"] - b["accuracy"]) for b in reliability(confidence, correct, bins))
    return 100 * sum(gaps) / max(len(confidence), 1)


@dataclass(frozen=True)
class Rejection:
    """Threshold on the known score of an image, below which it belongs to none of a task's classes (rejection.py).

    `offsets` in nats are added to the left-out scores of the support; `rate` is the share (0..1) of images of the
    task's own classes that fell below on the classes of the fit.
    """

    offsets: TaskTable
    rate: float
