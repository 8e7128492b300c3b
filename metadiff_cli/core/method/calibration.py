"""Numbers fitted on validation classes for a grid of tasks, and read for any task."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np


@dataclass(frozen=True)
class TaskTable:
    """A smooth function of ways N and shots K: bilinear in log N and log K between the fitted points."""

    ways: tuple[int, ...]
    shots: tuple[int, ...]
    values: tuple[tuple[float, ...], ...]  # a row for each of `ways`

    def at(self, way: int, shot: float) -> float:
        """The value for N ways and K shots (the mean over the classes when they differ); constant beyond the grid."""
        along = [np.interp(math.log(max(shot, 1.0)), np.log(self.shots), row) for row in self.values]
        return float(np.interp(math.log(way), np.log(self.ways), along))

    @classmethod
    def of(cls, found: Mapping[tuple[int, int], float]) -> Self:
        """From the value of every (way, shot) of a grid."""
        ways, shots = (tuple(sorted({pair[i] for pair in found})) for i in (0, 1))
        return cls(ways, shots, tuple(tuple(found[way, shot] for shot in shots) for way in ways))

    @classmethod
    def from_dict(cls, document: Mapping[str, Any], key: str = "values") -> Self:
        """From a checkpoint's header, where it is a dictionary of lists. Raises ValueError for a wrong shape."""
        rows = tuple(tuple(map(float, row)) for row in document[key])
        table = cls(tuple(map(int, document["ways"])), tuple(map(int, document["shots"])), rows)
        if len(rows) != len(table.ways) or any(len(row) != len(table.shots) for row in rows):
            raise ValueError("a table in its tuning has a wrong shape")
        return table
