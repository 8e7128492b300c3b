"""Numbers fitted on validation classes for a grid of tasks, and read for any task."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np


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
